"""Memory of a training run in bytes, by arithmetic alone: imports no torch, allocates nothing.

The numbers follow what our code does, not what papers assume. Parameters are fp32 in every stage; ``model.precision:
bf16`` is autocast, so bf16 copies come on top of fp32 weights. Under ZeRO 1 to 3 DeepSpeed keeps one more fp32 copy of
the trained weights, split over the workers, although they are fp32 already. Sources: ``learner/engine.py``, DeepSpeed
0.19.8 ``runtime/zero/stage_1_and_2.py`` and ``stage3.py``, diffusers' ``JointTransformerBlock``, transformers'
``Qwen2_5_VLDecoderLayer``; autograd's hooks showed which tensors it keeps (``tests/planning/test_plan.py``).

Left out: the allocator's fragmentation, CUDA context and NCCL (see ``usable``), and passes without gradient (VAE,
visual tower), whose tensors are freed before those counted here exist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deepgen.models.presets import Architecture

if TYPE_CHECKING:
    from deepgen.models.unified import UnifiedModel

GIB = 1 << 30
FP32 = 4
BUCKET = 4 * 500_000_000  # DeepSpeed's default reduce_bucket_size and allgather_bucket_size, allocated in full
LIVE = 1_000_000_000  # stage3_max_live_parameters: the most parameters that ZeRO-3 keeps gathered
PREFETCH = 50_000_000  # stage3_prefetch_bucket_size: parameters that ZeRO-3 gathers ahead


def usable(gpu_gib: int) -> int:
    """Bytes of a GPU that a plan may fill: less 5 % for fragmentation and 2 GiB for CUDA context and NCCL.

    Both figures are experience from elsewhere, not measured here.
    """
    return int((gpu_gib * 0.95 - 2) * GIB)


# ---- States: memory in use between two batches ----


@dataclass(frozen=True)
class Parameters:
    """Sizes of a model's parameters, in elements.

    matrices, vectors: trained parameters with two or more dimensions, and with fewer; the two groups of the optimizer.
    frozen: frozen parameters that ZeRO-3 splits too. whole: elements of frozen parts that ZeRO-3 does not split (the
    VAE, buffers). reference: elements of the KL reference, which only the learner has, unsplit.
    """

    matrices: tuple[int, ...]
    vectors: tuple[int, ...]
    frozen: tuple[int, ...]
    whole: int = 0
    reference: int = 0

    @classmethod
    def of(cls, model: UnifiedModel, stage: str) -> Parameters:
        """Sizes for a model on any device. Starts `stage` on the model, which now trains that stage's parameters."""
        trained = [parameter for _, parameter in model.trainable_parameters(stage)]
        in_vae = {id(parameter) for parameter in model.vae.parameters()}
        frozen = [p for p in model.parameters() if not p.requires_grad and id(p) not in in_vae]
        return cls(
            matrices=tuple(p.numel() for p in trained if p.dim() >= 2),
            vectors=tuple(p.numel() for p in trained if p.dim() < 2),
            frozen=tuple(p.numel() for p in frozen),
            whole=sum(t.numel() for t in (*model.vae.parameters(), *model.buffers())),
        )

    @property
    def trained(self) -> int:
        return sum(self.matrices) + sum(self.vectors)

    @property
    def largest(self) -> int:
        return max((*self.matrices, *self.vectors), default=0)


@dataclass(frozen=True)
class States:
    """Bytes on each GPU between two batches, and bytes that come and go with the optimizer step and the export.

    ``gradients`` are kept from the first micro-batch to the step. ``buffers``: communication buffers, present during a
    batch. ``step``: the largest of the gradients' second copy, AdamW's temporary and the all-gather. ``export``: the
    whole model, which every rank loads before ZeRO-3 splits it, and gathers again to write the result. ``host``: main
    memory that a rank needs for an offloaded optimizer.
    """

    frozen: int
    weights: int
    master: int
    gradients: int
    moments: int
    ema: int
    buffers: int
    step: int
    export: int
    host: int

    @property
    def kept(self) -> int:
        return self.frozen + self.weights + self.master + self.gradients + self.moments + self.ema


def states(
    parameters: Parameters, zero_stage: int, workers: int, *, ema: bool = False, offload_optimizer: bool = False
) -> States:
    """Bytes of weights, gradients and optimizer on one of ``workers`` GPUs under ZeRO ``zero_stage``.

    For T trained fp32 elements on W workers, stage 0 keeps 4T weights, 4T gradients and 8T moments. Stages 1 and 2
    flatten each optimizer group, pad it to a multiple of 2 x workers, and split a copy of it (4T/W) and its moments
    (8T/W). In stage 1 the gradients stay whole (4T, and a split copy at the step). In stage 2 a rank keeps the
    gradients of the parameters that begin, end or lie in its part. Stage 3 splits every parameter, rounded up,
    including frozen ones. An offloaded optimizer keeps copy, moments and gradients in main memory: 24 bytes per
    element, with two more buffers for accumulating and for the way back.
    """
    trained, share, whole = parameters.trained, 0, parameters.whole + parameters.reference
    if zero_stage == 0:
        if offload_optimizer:
            raise ValueError("an optimizer can be offloaded from ZeRO stage 1 on")
        ema_bytes = FP32 * trained * ema
        frozen = FP32 * (sum(parameters.frozen) + whole)
        bucket = min(FP32 * trained, BUCKET + FP32 * parameters.largest)
        gradients, moments = FP32 * trained, 2 * FP32 * trained
        return States(
            frozen, FP32 * trained, 0, gradients, moments, ema_bytes, 0, max(bucket, FP32 * trained), 0, 0
        )  # AdamW's temporary is as large as the weights
    if zero_stage == 3:
        share = sum(math.ceil(n / workers) for n in (*parameters.matrices, *parameters.vectors))
        weights = FP32 * share
        frozen = FP32 * (sum(math.ceil(n / workers) for n in parameters.frozen) + whole)
        everything = trained + sum(parameters.frozen)
        # Persistent parameters count among the live ones, unless everything fits.
        buffers = BUCKET + FP32 * min(LIVE + PREFETCH, everything)
        export = FP32 * everything
        gradients = FP32 * share
    else:
        padded = sum(_padded(sum(group), 2 * workers) for group in (parameters.matrices, parameters.vectors) if group)
        share, weights = padded // workers, FP32 * padded
        frozen = FP32 * (sum(parameters.frozen) + whole)
        buffers, export = BUCKET, 0
        # Stage 2 accumulates into one split copy while the next backward fills another.
        gradients = FP32 * trained if zero_stage == 1 else FP32 * share
        buffers += 0 if zero_stage == 1 else FP32 * share
    step = max(FP32 * share, BUCKET)  # in turn: flattened gradients, AdamW's temporary, all-gather
    ema_bytes = ema * (FP32 * share if zero_stage == 3 else FP32 * trained)
    if offload_optimizer:
        kept = FP32 * trained if zero_stage == 1 else 0
        return States(frozen, weights, 0, kept, 0, ema_bytes, buffers, BUCKET, export, 6 * FP32 * share)
    return States(frozen, weights, FP32 * share, gradients, 2 * FP32 * share, ema_bytes, buffers, step, export, 0)


def _padded(count: int, unit: int) -> int:
    return math.ceil(count / unit) * unit


# ---- Activations: what autograd keeps for the backward pass ----


@dataclass(frozen=True)
class Numbers:
    """Bytes per number, by where the number occurs. They depend on autocast, which differs between devices.

    matrix: inputs and outputs of linear layers. norm: inputs and outputs of LayerNorm (CUDA's autocast runs it in
    fp32).
    attention: query, key and value as the attention kernel keeps them (``models.attention.attend``: fp32 on a CPU).
    dropout: the dropout mask. casts: how many bf16 copies the q, k and v projections make of one fp32 input.
    """

    matrix: int
    norm: int
    attention: int
    dropout: int
    casts: int

    @property
    def cast(self) -> int:
        """Bytes per number of the bf16 copy that autocast makes of a weight; 0 if the weight itself is used."""
        return self.matrix if self.matrix < FP32 else 0


CUDA_BF16 = Numbers(matrix=2, norm=4, attention=2, dropout=1, casts=3)
CUDA_FP32 = Numbers(matrix=4, norm=4, attention=4, dropout=1, casts=1)
CPU_BF16 = Numbers(matrix=2, norm=2, attention=4, dropout=4, casts=1)
CPU_FP32 = Numbers(matrix=4, norm=4, attention=4, dropout=4, casts=1)


def _attention(n: Numbers, trained: bool, joint: bool) -> int:
    """Bytes per channel of a token in an SD3 attention, from the projections' inputs to the output projection.

    q and k each keep the projection's output, RMSNorm's fp32 copy of it (unless it is fp32 already), the product that
    the norm's trained weight multiplies, and the kernel's input. v and the output keep what the kernel keeps. The joint
    attention also slices off a copy of the output for its projection. The S x S matrix is never kept.
    """
    normed = n.matrix + (FP32 if n.matrix < FP32 else 0) + (FP32 if trained else 0) + n.attention
    kept = 2 * normed + 2 * n.attention
    if trained:
        copied = n.matrix if joint or n.attention != n.matrix else 0
        kept += n.casts * n.matrix + copied
    return kept + n.matrix  # the projected output, which the gate multiplies


def _stream(n: Numbers, trained: bool, dual: bool, width: int) -> int:
    """Bytes per token of one stream (image or context) in a joint block: two LayerNorms, attention, 4x wide MLP."""
    norms = 4 * n.norm  # input and output of two norms; the modulation multiplies the output
    # GELU's input and the MLP's output; if trained, also the inputs of both linear layers.
    mlp = 4 * n.matrix + n.matrix + (n.matrix + 4 * n.matrix if trained else 0)
    total = norms + mlp + _attention(n, trained, joint=True)
    return width * (total + (_attention(n, trained, joint=False) if dual else 0))


def dit_activations(
    architecture: Architecture,
    n: Numbers,
    *,
    batch: int,
    image_tokens: int,
    context_tokens: int,
    trained: bool,
    checkpointing: bool,
) -> int:
    """Bytes that the DiT keeps for the backward pass of one micro-batch.

    image_tokens: targets and references of one sample; context_tokens: its prompt, image and think tokens. Without
    ``trained`` the gradient only passes through. Frozen linear layers then keep no inputs, but the bf16 copies of their
    weights that autocast has made, which are counted here because nothing else holds them. With checkpointing, a block
    keeps its two inputs, and one block at a time is computed again.
    """
    dit = architecture.transformer
    width = dit["num_attention_heads"] * dit["attention_head_dim"]
    layers, dual = dit["num_layers"], len(dit["dual_attention_layers"])
    image, context = batch * image_tokens, batch * context_tokens
    plain_block = image * _stream(n, trained, False, width) + context * _stream(n, trained, False, width)
    dual_block = plain_block + image * width * _attention(n, trained, joint=False)
    # The last block returns no context: its context side has only norm, projections and attention.
    last_context = 2 * n.norm + _attention(n, trained, joint=True) - n.matrix - (n.matrix if trained else 0)
    last = image * _stream(n, trained, False, width) + context * width * last_context
    casts = 0 if trained else n.cast * dit_linears(architecture)
    ends = context * (architecture.context_dim * n.matrix if trained else 0) + image * width * (2 * n.norm + n.matrix)
    if checkpointing:
        largest = dual_block if dual else plain_block
        return layers * (image + context) * width * n.matrix + largest + casts // layers + ends
    return (layers - 1 - dual) * plain_block + dual * dual_block + last + casts + ends


def dit_linears(architecture: Architecture) -> int:
    """Elements of the weights of the DiT's linear layers (with modulation), which are nearly all its weights."""
    dit = architecture.transformer
    width = dit["num_attention_heads"] * dit["attention_head_dim"]
    layers, dual = dit["num_layers"], len(dit["dual_attention_layers"])
    block = 2 * (4 + 8 + 6) * width**2  # image and context: attention, MLP, modulation
    return layers * block + dual * (4 + 3) * width**2 - (1 + 8 + 4) * width**2


def bridge_activations(architecture: Architecture, n: Numbers, *, batch: int, context_tokens: int) -> int:
    """Bytes that the trained bridge keeps: connector blocks, which are never checkpointed, and the projectors' inputs.

    A block keeps, for each token: inputs of both LayerNorms, inputs of the projections, q, k, v and output of the
    attention, and three tensors of the MLP.
    """
    hidden, mlp = architecture.connector_hidden, architecture.connector_mlp
    attention = 4 * n.attention + (n.matrix if n.attention != n.matrix else 0)
    block = hidden * (2 * n.norm + n.casts * n.matrix + attention + n.matrix) + 2 * mlp * n.matrix
    ends = n.matrix * (architecture.vlm_hidden * len(architecture.fusion_layers) + hidden)
    return batch * context_tokens * (architecture.connector_layers * block + ends)


def vlm_activations(
    architecture: Architecture, n: Numbers, *, batch: int, context_tokens: int, lora_rank: int, checkpointing: bool
) -> int:
    """Bytes that the VLM's decoder keeps when a gradient passes through it, to the think tokens or to its LoRA.

    The residual stream is fp32, because embeddings are. A layer keeps, for each token: the inputs of both RMSNorms
    (fp32), q, k, v (repeated to all heads) and output of the attention, and three inner tensors of the MLP. The base
    weights are frozen: their layers keep no inputs, only autocast's copy of the weight. A LoRA keeps, for each of its
    seven layers, the dropout mask, a copy of the input and the low-rank result. Only layers up to the deepest state
    that the bridge reads run.
    """
    text = architecture.vlm["text_config"]
    hidden, mlp = text["hidden_size"], text["intermediate_size"]
    layers = architecture.fusion_layers[0]
    layer = 2 * FP32 * hidden + 4 * n.matrix * hidden + 3 * n.matrix * mlp
    if lora_rank:
        layer += (6 * hidden + mlp) * (n.dropout + n.matrix) + 7 * lora_rank * n.matrix
    tokens = batch * context_tokens
    casts = n.cast * decoder_linears(architecture)
    if checkpointing:
        return layers * tokens * FP32 * hidden + tokens * layer + casts
    return layers * (tokens * layer + casts)


def decoder_linears(architecture: Architecture) -> int:
    """Elements of the weights of the seven linear layers in one decoder layer."""
    text = architecture.vlm["text_config"]
    hidden = int(text["hidden_size"])
    kv = text["num_key_value_heads"] * hidden // text["num_attention_heads"]
    return 2 * hidden**2 + 2 * hidden * kv + 3 * hidden * int(text["intermediate_size"])
