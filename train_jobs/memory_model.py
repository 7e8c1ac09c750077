"""How many bytes a training worker takes, part by part: arithmetic alone.

In: a `ModelShape`, a `BatchShape` and where it runs. Out: a `Memory` whose parts add up to the peak.
Does not know files, tokenizers or recipes.

Letters in formulas: b rows, t positions of a row, h `d_model`, f `d_feed_forward`, a heads of width d, g of keys and
values, V the vocabulary, r ranks, N workers, P trainable parameters. Bytes in docstrings are those of bfloat16, in
which LMs are computed, but on CPUs that lack it: there each of its 2 bytes is 4.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

from mmllm_core.config import Quantization
from train_jobs.model_shape import AdapterShape, ModelShape, Read
from train_jobs.zero import reduce_bucket

ZeroStage = Literal[0, 1, 2, 3]
ZERO_STAGES: tuple[ZeroStage, ...] = (0, 1, 2, 3)

ACCOUNTED = frozenset({"llama", "phi3", "phi"})
"""By `model_type`: LMs whose layers the arithmetic was held against. Others are counted as Llama's."""
_FP32 = 4


@dataclass(frozen=True)
class BatchShape:
    """The largest batch of a worker."""

    rows: int
    length: int
    """Positions of a row."""
    n_supervised: float
    """Supervised positions of a row."""
    n_images: float
    """Images of a row."""
    queries: float = 1.0
    """Of attention, for each position; above 1 if conversations are filled up."""
    keys: float = 1.0
    """That attention reads, for each position; more than queries if conversations share what they begin with."""


@dataclass(frozen=True)
class Setting:
    """Where and how a worker trains."""

    zero_stage: ZeroStage
    workers: int
    gpu: bool
    runtime: float
    """Bytes taken before anything of the model is there."""
    slack: float
    """What the allocator holds beyond what is in use, as a share of what a step adds."""
    offload_optimizer: bool = False
    offload_parameters: bool = False
    gradient_checkpointing: bool = False
    logits_at_once: float = math.inf
    """Logits that the loss holds at any time (`mmllm_core.loss`)."""
    floats_at_once: float = math.inf
    """Of those, how many are float32."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker at its peak, which is where the backward pass begins, or the optimizer's step."""

    runtime: float
    mapped: float
    """The LM's file, which stays mapped into memory on CPU, as embeddings and norms are used where they lie in it."""
    weights: float
    """What is frozen: the LM, as far as it is not the mapped file, and CLIP's tower where it runs."""
    trainable: float
    """What is trained, as the forward pass sees it."""
    gradients: float
    optimizer: float
    """Master copy and AdamW's two moments."""
    activations: float
    logits: float
    working: float
    """What a layer's backward pass needs for the moment."""
    bucket: float
    """Where DeepSpeed gathers gradients to exchange them."""
    slack: float
    update: float
    """What the optimizer's step takes beyond what the backward pass has given back: its gradients in float32."""

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


def memory(model: ModelShape, batch: BatchShape, setting: Setting) -> Memory:
    """Bytes of a worker at its peak.

    The states of training follow ZeRO (Rajbhandari et al., arXiv:1910.02054, section 5): with N workers, stage 1 keeps
    an N-th of the optimizer's state, stage 2 also of the gradients, stage 3 also of all parameters, frozen ones
    included. DeepSpeed keeps, for each trainable parameter, 2 bytes in bfloat16, 2 of gradient (4 from stage 2 on,
    which adds them up in float32), and 12 of float32 master copy and moments (section 3.1, K = 12). At stage 3 the
    largest layer is gathered whole while it runs.

    ZeRO-Offload (Ren et al., arXiv:2101.06840, section 4) takes the optimizer's state out of a GPU's memory, and from
    stage 2 on gradients, as they come; ZeRO-Infinity (arXiv:2104.07857) also parameters. On CPU both stay where they
    are. Gradients are accumulated where they lie: more micro-batches a step take nothing more.
    """
    share = 1 / setting.workers
    stage, trained = setting.zero_stage, model.n_trainable
    quantized = bytes_per_weight(model.quantization, model.dtype_bytes)
    parameters_share = share if stage >= 3 else 1.0
    gradients_share = share if stage >= 2 else 1.0
    optimizer_share = share if stage >= 1 else 1.0
    if setting.gpu and setting.offload_parameters:
        parameters_share = 0.0
    optimizer_here = not (setting.gpu and setting.offload_optimizer)
    if not optimizer_here and stage >= 2:
        gradients_share = 0.0
    activations = activation_bytes(model, setting, batch)
    logits = logit_bytes(model, batch, setting)
    working = working_bytes(model, setting, batch)
    gathered = model.largest_linear * quantized if stage >= 3 else 0.0
    transient = activations + logits + working
    float_gradients = _FP32 * trained * optimizer_share if optimizer_here else 0.0
    lies_in_its_file = stays_mapped(model, setting) and not model.trains_whole_lm  # trained ones move to DeepSpeed's
    return Memory(
        runtime=setting.runtime,
        mapped=float((model.n_linear + model.n_kept) * model.dtype_bytes) if lies_in_its_file else 0.0,
        weights=frozen_bytes(model, setting) * parameters_share + gathered,
        trainable=model.dtype_bytes * trained * parameters_share,
        gradients=(_FP32 if stage >= 2 else model.dtype_bytes) * trained * gradients_share,
        optimizer=3 * _FP32 * trained * optimizer_share if optimizer_here else 0.0,
        activations=activations,
        logits=logits,
        working=working,
        bucket=bucket_bytes(model),
        slack=setting.slack * transient,
        update=max(0.0, float_gradients - transient),
    )


def frozen_bytes(model: ModelShape, setting: Setting) -> float:
    """Bytes of what is not trained, whole: the LM's weights, on CPU only what is quantized and so lies not in the
    mapped file, and CLIP's tower in float32."""
    tower = model.tower.n_parameters * _FP32 if model.tower and not model.n_trained_tower else 0
    if model.trains_whole_lm:
        return float(tower)
    if not stays_mapped(model, setting):
        return weight_bytes(model) + tower
    quantized = bytes_per_weight(model.quantization, model.dtype_bytes)
    return model.n_linear * quantized * (model.quantization != "none") + tower


def stays_mapped(model: ModelShape, setting: Setting) -> bool:
    """Whether weights are used where they lie in the LM's file: on CPU, unless they are converted to float32, for
    files hold 2 bytes a weight."""
    return not setting.gpu and model.dtype_bytes < _FP32


def bytes_per_weight(quantization: Quantization, dtype_bytes: int) -> float:
    """Bytes of a weight of a linear layer.

    NF4: 4 bits, and of double quantization 8 bits for each 64 weights and 32 for each 256 of those, that is 0.127 bits
    a weight (QLoRA: Dettmers et al., arXiv:2305.14314, section 3). int8: 8 bits; its scales, one a row, are left out
    (Dettmers et al., arXiv:2208.07339).
    """
    if quantization == "nf4":
        return (4 + 8 / 64 + 32 / (64 * 256)) / 8
    return 1.0 if quantization == "int8" else float(dtype_bytes)


def weight_bytes(model: ModelShape) -> float:
    """Bytes of the frozen LM: quantized linear layers, and embeddings, head and norms in the LM's dtype."""
    quantized = bytes_per_weight(model.quantization, model.dtype_bytes)
    return model.n_linear * quantized + model.n_kept * model.dtype_bytes


def activation_bytes_per_position(model: ModelShape, queries: float = 1.0, keys: float = 1.0) -> float:
    """Bytes that the LM's layers keep for their backward pass, for one position.

    The account of Korthikanti et al. (arXiv:2205.05198, section 4.1), taken anew for the layers that transformers runs:
    there is no dropout, frozen linear layers keep nothing of their inputs, and adapted or trained ones keep what they
    read. Tests hold it against what autograd keeps of small models.

    Attention keeps queries (2 a d), keys and values (4 g d), its result (2 a d) and a float32 log-sum for each head
    (FlashAttention, arXiv:2205.14135, section 3.1), for as many `queries` and `keys` as there are to each position.
    Where conversations share what they begin with, attention has a mask, and with one transformers repeats keys and
    values for every head of queries: 4 a d for each key.
    """
    n_adapted = model.adapter.n_layers if model.adapter else 0
    plain = _layer(model, _plain_reads(model)) + _attention(model, queries, keys)
    layers = (model.n_layers - n_adapted) * plain + n_adapted * _largest_layer(model, queries, keys)
    final_norm = model.dtype_bytes * model.d_model if model.model_type == "phi" else _FP32 * (model.d_model + 1)
    return layers + final_norm + model.cross_attention_bytes


def _largest_layer(model: ModelShape, queries: float, keys: float) -> float:
    """Bytes that the layer which keeps most keeps for one position: one with an adapter, if there is any."""
    kept = _adapted_layer(model, model.adapter) if model.adapter else _layer(model, _plain_reads(model))
    return kept + _attention(model, queries, keys)


def _attention(model: ModelShape, queries: float, keys: float) -> float:
    """What attention keeps in each layer."""
    heads = model.n_heads * model.head_dim
    read = heads if keys > queries else model.n_kv_heads * model.head_dim
    return queries * (2 * model.dtype_bytes * heads + _FP32 * model.n_heads) + keys * 2 * model.dtype_bytes * read


def _adapted_layer(model: ModelShape, adapter: AdapterShape) -> float:
    """A layer with an adapter: also what that reads, and its ranks; with dropout each linear layer keeps its own."""
    width = model.dtype_bytes
    kept = _layer(model, frozenset() if adapter.dropout else adapter.reads) + width * adapter.per_layer_rank
    if adapter.dropout:  # each adapted layer drops for itself: its own input, and a mask of one byte
        kept += (width + 1) * adapter.per_layer_inputs
    return kept


def _plain_reads(model: ModelShape) -> frozenset[Read]:
    """What linear layers without an adapter read and keep."""
    return AdapterShape.reads if model.trains_whole_lm else frozenset()


def _layer(model: ModelShape, reads: frozenset[Read]) -> float:
    """A layer without what attention keeps, but with its result in the line's order, if that is read once more.

    Args:
        reads: what linear layers read and keep, once for all that read it.
    """
    kept = _phi2_layer(model, reads) if model.model_type == "phi" else _gated_layer(model, reads)
    return kept + model.dtype_bytes * model.n_heads * model.head_dim * ("attention_out" in reads)


def _gated_layer(model: ModelShape, reads: frozenset[Read]) -> float:
    """Llama, Phi-3 and their like: two RMS norms that keep float32 copies and scales (8 h + 8), and a gated
    feed-forward layer that keeps gate, activated gate and up-projection (6 f); with an adapter also what it reads (4 h
    + 2 f where all linear layers are adapted)."""
    width = model.dtype_bytes
    kept = 2 * _FP32 * (model.d_model + 1) + 3 * width * model.d_feed_forward
    kept += width * model.d_model * (("attention_in" in reads) + ("feed_forward_in" in reads))
    kept += width * model.d_feed_forward * ("feed_forward_out" in reads)
    if model.trains_whole_lm:
        kept += 2 * width * model.d_model  # what each norm's scale is multiplied with
    return kept


def _phi2_layer(model: ModelShape, reads: frozenset[Read]) -> float:
    """phi-2: one layer norm for attention and feed-forward layer (2 h + 4), and a GELU that transformers spells out in
    elementary operations, which keep four tensors (8 f); with an adapter also what it reads (2 h + 2 f)."""
    width = model.dtype_bytes
    kept = width * (model.d_model + 2) + 4 * width * model.d_feed_forward
    kept += width * model.d_model * bool(reads & {"attention_in", "feed_forward_in"})
    return kept + width * model.d_feed_forward * ("feed_forward_out" in reads)


def activation_bytes(model: ModelShape, setting: Setting, batch: BatchShape) -> float:
    """Bytes that a micro-batch keeps for its backward pass.

    With gradient checkpointing (Chen et al., arXiv:1604.06174) a layer keeps its input alone, 2 h a position, and one
    layer at a time keeps all that it would have kept.
    """
    if setting.gradient_checkpointing:
        inputs = model.n_layers * model.dtype_bytes * model.d_model
        kept = inputs + _largest_layer(model, batch.queries, batch.keys) + model.cross_attention_bytes
    else:
        kept = activation_bytes_per_position(model, batch.queries, batch.keys)
    image = model.connector_bytes * bool(model.n_trained_connector)
    if model.tower and model.n_trained_tower:
        image += model.tower.kept_bytes
    return batch.rows * (kept * batch.length + batch.n_images * image)


def logit_bytes(model: ModelShape, batch: BatchShape, setting: Setting) -> float:
    """Bytes of the loss, whose logits exist at supervised positions alone, and chunk by chunk (`mmllm_core.loss`).

    A chunk is in bfloat16, a block of it in float32. Kept for the backward pass are the gradient of all hidden states,
    2 h a position, and that of the head in float32, 4 V h, if it is trained.
    """
    positions = batch.rows * batch.n_supervised
    logits = positions * model.vocabulary
    width = model.dtype_bytes
    kept = width * positions * model.d_model + _FP32 * model.vocabulary * model.d_model * model.trains_whole_lm
    floats = _FP32 * min(logits, setting.floats_at_once) * (width < _FP32)
    return width * min(logits, setting.logits_at_once) + floats + kept


def working_bytes(model: ModelShape, setting: Setting, batch: BatchShape) -> float:
    """Bytes for the moment: gradients of what one layer kept, and its largest weight dequantized (QLoRA, section 3)."""
    layer = _largest_layer(model, batch.queries, batch.keys)
    dequantized = 0.0 if model.quantization == "none" else float(model.dtype_bytes * model.largest_linear)
    return batch.rows * batch.length * layer + dequantized


def bucket_bytes(model: ModelShape) -> float:
    """Bytes of DeepSpeed's reduce bucket."""
    return float(model.dtype_bytes * reduce_bucket(model.n_trainable))


def checkpoint_bytes(model: ModelShape) -> float:
    """Bytes of a checkpoint: weights and both moments of what is trained, in float32 (`train_jobs.checkpoint`)."""
    return 3.0 * _FP32 * model.n_trainable
