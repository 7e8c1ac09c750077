"""A request in vLLM's words, and what vLLM finds in ours. Does not know how vLLM is run."""

from typing import Any

from torch import Tensor

from mmllm_core.engine.protocol import EngineChunk, EngineRequest, SamplingParams, TokenLogprob
from mmllm_core.engine.sampler import Choice
from mmllm_core.engine.sequence import Sequence


def prompt_of(request: EngineRequest, embeddings: Tensor, vocab_size: int) -> dict[str, Any]:
    """A prompt of embeddings (t, d_model) alone, beside which stands what tokens they are of, as far as that is known.

    vLLM computes none of these tokens; its repetition penalty goes by them. Left without, it takes whatever tokens
    an earlier request had at the same positions (`InputBatch.token_ids_cpu`, which is not cleared).
    """
    keys = request.keys or (-1,) * len(embeddings)
    known = [key if 0 <= key < vocab_size else vocab_size for key in keys]  # vocab_size: what vLLM pads with
    return {"prompt_embeds": embeddings, "prompt_token_ids": known, "prompt_is_token_ids": [False] * len(known)}


def sampling_of(sampling: SamplingParams, index: int, max_tokens: int, stop_ids: list[int]) -> Any:
    """vLLM's words for how an answer's tokens are chosen; its text, and stop strings in it, are our own.

    Where both are given, vLLM takes `top_p` of what `top_k` left, and not of all tokens.

    Raises:
        ValueError: out of vLLM's bounds.
    """
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    schema = sampling.json_schema
    return VllmSamplingParams(
        max_tokens=max_tokens,
        min_tokens=0 if schema else min(sampling.min_tokens, max_tokens),
        temperature=sampling.temperature,
        top_p=max(sampling.top_p, 1e-9),  # 0, which vLLM refuses, is the likeliest token alone
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=None if sampling.seed is None else (sampling.seed + index) % 2**63,
        logprobs=sampling.logprobs,
        stop_token_ids=stop_ids,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        structured_outputs=None if schema is None else StructuredOutputsParams(json=schema),
    )


def taken(sequence: Sequence, found: Any) -> list[EngineChunk]:
    """Chunks of tokens that vLLM found, a `CompletionOutput`; the answer may end among them."""
    chunks = []
    for i, token in enumerate(found.token_ids):
        n = sequence.call.request.sampling.logprobs
        logprob = None if n is None else _logprob(token, found.logprobs[i], n)
        if chunk := sequence.take(Choice(token, logprob)):
            chunks.append(chunk)
        if sequence.finished:
            break
    return chunks


def _logprob(token: int, found: dict[int, Any], n: int) -> TokenLogprob:
    ranked = sorted(found.items(), key=lambda item: item[1].rank)
    top = tuple((other, value.logprob) for other, value in ranked if value.rank <= n)
    return TokenLogprob(token, found[token].logprob, top)
