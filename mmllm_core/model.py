"""MultimodalLM: features or pixels, and tokens -> inputs_embeds -> loss or text.

In: a collated batch (`mmllm_core.data.collate.Batch`). Out: the summed loss over supervised positions, or
greedy token ids. Does not know image files, Ray or DeepSpeed.
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
from mmllm_core.loss import summed_cross_entropy
from mmllm_core.packed_attention import IMPLEMENTATION, Packing, attend_packed
from mmllm_core.vision_tower import VisionTower

_AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings by which Gemma 2, Cohere and Granite change logits once more."""


class MultimodalLM(nn.Module):
    """A causal LM that sees through a connector.

    Args:
        lm: a Hugging Face causal LM, plain or wrapped by peft.
        connector: features (b, n, d_vision) -> embeddings (b, m, d_model).
        vision: CLIP's vision tower, where pixels are given rather than features. Whether it is trained is settled
            here: a frozen one is no part of the module, so that it stays in float32 on its own device when the module
            is moved or cast, and gives the features that the feature store holds.

    Raises:
        ConfigError: an LM that does more to logits than its head does, or one that the connector cannot be set into.
    """

    def __init__(self, lm: nn.Module, connector: Connector, vision: VisionTower | None = None):
        super().__init__()
        self.lm = lm
        self.connector = connector
        trained = vision is not None and any(p.requires_grad for p in vision.parameters())
        self.vision = vision if trained else None
        self._plain_attention = self.causal_lm.config._attn_implementation
        self._frozen_vision = () if vision is None or trained else (vision,)  # a tuple's contents are not registered
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
        return self._embed(input_ids, features, 0 if features is None else len(features))

    def _embed(self, input_ids: Tensor, shown: Tensor | None, n_images: int) -> Tensor:
        """`embed`, where of the images shown only the first `n_images` have positions."""
        is_image = input_ids == IMAGE_TOKEN_ID  # (b, t)
        n_positions = int(is_image.sum())
        embeddings: Tensor = self.causal_lm.get_input_embeddings()(
            input_ids.masked_fill(is_image, 0)
        )  # (b, t, d_model)
        placed = None if shown is None else self.connector.place(shown)  # (n_shown, m, d_model)
        n_placed = 0 if placed is None else n_images * placed.shape[1]
        if n_positions != n_placed:
            raise ValueError(f"{n_positions} image positions and {n_placed} embeddings of images")
        if placed is None:
            return embeddings
        return embeddings.masked_scatter(is_image.unsqueeze(-1), placed.flatten(0, 1).to(embeddings.dtype))

    def see(self, pixels: Tensor) -> Tensor:
        """Features (n_images, n, d_vision) of pixels (n_images, 3, h, w); those of a frozen tower as they are stored.

        Raises:
            ValueError: the model was made without a vision tower.
        """
        features: Tensor
        if self.vision is not None:
            features = self.vision(pixels)
            return features
        if not self._frozen_vision:
            raise ValueError("pixels were given, and the model was made without a vision tower")
        with torch.no_grad():
            features = self._frozen_vision[0](pixels).half().float().contiguous()
            return features

    def media(self, input_ids: Tensor, features: Tensor | None, packing: Packing | None = None) -> Media | None:
        """What the LM's layers look at; None for connectors that place all of an image in the prompt.

        Args:
            input_ids, features: as for `embed`.
            packing: of conversations in one line, each of which sees its own images.
        """
        if not isinstance(self.connector, CrossAttentionConnector):
            return None
        if features is None:
            return None
        starts = None if packing is None else packing.starts
        return Media(self.connector(features), last_image(input_ids == IMAGE_TOKEN_ID, starts))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        features: Tensor | None,
        packing: Packing | None = None,
        pixels: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy summed over supervised positions; logits are computed there and nowhere else.

        Args:
            input_ids, attention_mask, labels: int64 (b, t), padded on the right.
            features: (n_images, n, d_vision) or None.
            packing: of conversations in one line (b = 1), which attend to themselves alone, as all training has them.
            pixels: (n_images, 3, h, w) in place of features, for a model with a vision tower.

        Returns:
            float32 scalar: the sum, so that callers normalise by a global count of supervised tokens.

        Raises:
            ValueError: image positions and features do not match in number; pixels beside features or without a
                vision tower; or features where the vision tower is trained, which they would leave out.
            ConfigError: conversations are packed, and the LM cannot attend to them.
        """
        if features is not None and (pixels is not None or self.vision is not None):
            raise ValueError("features were given beside pixels or a trained vision tower: give pixels alone")
        if pixels is not None:
            features = self.see(pixels)
        n_images = 0 if features is None else len(features)
        shown = self._shown(features, input_ids.device)
        embeddings = self._embed(input_ids, shown, n_images)
        self._show(self.media(input_ids, shown, packing))
        self.attend(packed=packing is not None)
        place: dict[str, Any] = {"attention_mask": attention_mask}
        if packing is not None:
            place = {"position_ids": packing.position_ids, "packing": packing}
        hidden = self.causal_lm.base_model(
            inputs_embeds=embeddings, use_cache=False, **place
        ).last_hidden_state  # (b, t, d_model)
        targets = labels[:, 1:]  # position i predicts token i + 1
        supervised = targets != IGNORE_INDEX
        head = self.causal_lm.get_output_embeddings()
        return summed_cross_entropy(head, hidden[:, :-1][supervised], targets[supervised])

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
        self.attend(packed=False)
        with self.showing(self.media(input_ids, features)):
            ids: Tensor = self.causal_lm.generate(
                inputs_embeds=self.embed(input_ids, features),
                attention_mask=attention_mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=stop_ids,
                pad_token_id=stop_ids[0],
            )
            return ids

    @contextmanager
    def showing(self, media: Media | None) -> Iterator[None]:
        """Let the LM's layers look at `media` within the block, and at nothing after it."""
        self._show(media)
        try:
            yield
        finally:
            self._show(None)

    def _shown(self, features: Tensor | None, device: torch.device) -> Tensor | None:
        """The features, or in training those of a blank image that no position looks at.

        Workers exchange the gradients of all parameters, so connector and vision tower must take part in every step,
        on batches of text alone too; one that does not would keep the others waiting for ever.
        """
        if features is not None or not self.training:
            return features
        if self.vision is not None:
            blank: Tensor = self.vision(self.vision.blank(device))
            return blank
        return torch.zeros(1, 1, self.connector.d_vision, device=device)  # (n_images, n, d_vision)

    def attend(self, *, packed: bool) -> None:
        """Make the LM ready for packed conversations or plain rows: for whoever calls it without `forward`.

        It stays so, for gradient checkpointing runs layers again later.

        Raises:
            ConfigError: the LM cannot attend to packed conversations.
        """
        lm = self.causal_lm
        current = lm.config._attn_implementation
        if packed and current != IMPLEMENTATION:
            self._plain_attention = current
            attend_packed(lm)
        elif not packed and current == IMPLEMENTATION:
            lm.set_attn_implementation(self._plain_attention)

    def _show(self, media: Media | None) -> None:
        if isinstance(self.connector, CrossAttentionConnector):
            self.connector.show(media)

    def checkpoint_gradients(self) -> None:
        """Compute activations again in the backward pass instead of keeping them, in the LM and a trained tower.

        Raises:
            ConfigError: an LM whose code does not provide for it.
        """
        try:
            # Reentrant checkpointing would need inputs that require gradients, and forbids cross-attention's hooks.
            self.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise ConfigError(
                f"gradient_checkpointing: '{self.causal_lm.config.model_type}' does not provide for it: leave it out"
            ) from error
        if self.vision is not None:
            self.vision.checkpoint_gradients()

    def trainable_names(self) -> set[str]:
        """The trainable manifest: names of parameters that training moves and a bundle must hold."""
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def parameters_of(self, part: str) -> Iterator[nn.Parameter]:
        """Trainable parameters of `connector`, `lm` or `vision`; none of a part that the model lacks."""
        module: nn.Module | None = getattr(self, part)
        return iter(()) if module is None else (p for p in module.parameters() if p.requires_grad)
