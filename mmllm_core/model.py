"""MultimodalLM: features and tokens -> inputs_embeds -> loss or text.

In: a collated batch (`mmllm_core.data.collate.Batch`). Out: the summed loss over supervised positions, or
greedy token ids. Does not know images, files, Ray or DeepSpeed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmllm_core.connectors import Connector, CrossAttentionConnector, Media
from mmllm_core.connectors.cross_attention import last_image
from mmllm_core.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID
from mmllm_core.errors import ConfigError

_AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings by which Gemma 2, Cohere and Granite change logits once more."""


class MultimodalLM(nn.Module):
    """A causal LM that sees through a connector.

    Args:
        lm: a Hugging Face causal LM, plain or wrapped by peft.
        connector: features (b, n, d_vision) -> embeddings (b, m, d_model).

    Raises:
        ConfigError: an LM that does more to logits than its head does, or one that the connector cannot be set into.
    """

    def __init__(self, lm: nn.Module, connector: Connector):
        super().__init__()
        self.lm = lm
        self.connector = connector
        config = self.causal_lm.config
        if rescaled := [name for name in _AFTER_THE_HEAD if getattr(config, name, None) not in (None, 1, 1.0)]:
            raise ConfigError(
                f"'{config.model_type}' changes logits after its head ({rescaled[0]}), where the loss is taken: "
                "choose another LM"
            )
        if isinstance(connector, CrossAttentionConnector):
            connector.attach(self.causal_lm.base_model)

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face model beneath peft, if any; adapters act inside it."""
        lm: Any = self.lm
        return lm.get_base_model() if hasattr(lm, "get_base_model") else lm

    @property
    def adapter(self) -> nn.Module | None:
        """The LM as peft wrapped it, or None without an adapter."""
        return self.lm if hasattr(self.lm, "peft_config") else None

    def embed(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """Embed tokens and put at the image positions what the connector places there.

        Args:
            input_ids: int64 (b, t), images as runs of `IMAGE_TOKEN_ID`.
            features: (n_images, n, d_vision) in order of appearance, or None without images.

        Returns:
            (b, t, d_model).

        Raises:
            ValueError: image positions and features do not match in number.
        """
        is_image = input_ids == IMAGE_TOKEN_ID  # (b, t)
        n_positions = int(is_image.sum())
        embeddings = self.causal_lm.get_input_embeddings()(input_ids.masked_fill(is_image, 0))  # (b, t, d_model)
        shown = self._shown(features, input_ids.device)
        placed = None if shown is None else self.connector.place(shown).flatten(0, 1)  # (n_images * m, d_model)
        n_placed = 0 if features is None or placed is None else len(placed)
        if n_positions != n_placed:
            raise ValueError(f"{n_positions} image positions and {n_placed} embeddings of images")
        if placed is None:
            return embeddings
        return embeddings.masked_scatter(is_image.unsqueeze(-1), placed.to(embeddings.dtype))

    def media(self, input_ids: Tensor, features: Tensor | None, position_ids: Tensor | None = None) -> Media | None:
        """What the LM's layers look at; None for connectors that place all of an image in the prompt.

        Args:
            input_ids, features: as for `embed`.
            position_ids: int64 (b, t) of packed conversations, each of which counts from 0 and sees its own images.
        """
        if not isinstance(self.connector, CrossAttentionConnector):
            return None
        shown = self._shown(features, input_ids.device)
        if shown is None:
            return None
        return Media(self.connector(shown), last_image(input_ids == IMAGE_TOKEN_ID, position_ids))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        features: Tensor | None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy summed over supervised positions; logits are computed there and nowhere else.

        Args:
            input_ids, attention_mask, labels: int64 (b, t), padded on the right.
            features: (n_images, n, d_vision) or None.
            position_ids: int64 (b, t), given if rows are packed: conversations count from 0 each, and attend to
                themselves alone.

        Returns:
            float32 scalar: the sum, so that callers normalise by a global count of supervised tokens.
        """
        embeddings = self.embed(input_ids, features)
        self._show(self.media(input_ids, features, position_ids))
        # Without a mask, transformers takes positions that start again for the borders of packed sequences.
        hidden = self.causal_lm.base_model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask if position_ids is None else None,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state  # (b, t, d_model)
        targets = labels[:, 1:]  # position i predicts token i + 1
        supervised = targets != IGNORE_INDEX
        logits = self.causal_lm.get_output_embeddings()(hidden[:, :-1][supervised])  # (n_supervised, vocab)
        return nn.functional.cross_entropy(logits.float(), targets[supervised], reduction="sum")

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        features: Tensor | None,
        *,
        max_new_tokens: int,
        stop_ids: list[int],
    ) -> Tensor:
        """Greedy decoding of a batch padded on the left.

        Returns:
            int64 (b, n_new) of new tokens alone, `n_new <= max_new_tokens`.
        """
        with self.showing(self.media(input_ids, features)):
            return self.causal_lm.generate(
                inputs_embeds=self.embed(input_ids, features),
                attention_mask=attention_mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=stop_ids,
                pad_token_id=stop_ids[0],
            )

    @contextmanager
    def showing(self, media: Media | None) -> Iterator[None]:
        """Let the LM's layers look at `media` within the block, and at nothing after it."""
        self._show(media)
        try:
            yield
        finally:
            self._show(None)

    def _shown(self, features: Tensor | None, device: torch.device) -> Tensor | None:
        """The features, or in training a blank image that no position looks at.

        Workers exchange the gradients of all parameters, so the connector must take part in every step, on batches of
        text alone too; one that does not would keep the others waiting for ever.
        """
        if features is None and self.training:
            return torch.zeros(1, 1, self.connector.d_vision, device=device)  # (n_images, n, d_vision)
        return features

    def _show(self, media: Media | None) -> None:
        if isinstance(self.connector, CrossAttentionConnector):
            self.connector.show(media)

    def trainable_names(self) -> set[str]:
        """The trainable manifest: names of parameters that training moves and a bundle must hold."""
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def parameters_of(self, part: str) -> Iterator[nn.Parameter]:
        """Trainable parameters of `connector` or `lm`."""
        return (p for p in getattr(self, part).parameters() if p.requires_grad)
