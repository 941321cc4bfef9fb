"""Memory of a training run in bytes, by arithmetic alone: imports no torch, allocates nothing.

What is counted is what our code does, not what papers assume. Parameters are fp32 in every stage; ``model.precision:
bf16`` is autocast, so bf16 copies come on top of fp32 weights. Under ZeRO 1 to 3 DeepSpeed keeps one more fp32 copy of
the trained weights, split over the workers, although they are fp32 already. Sources: ``learner/engine.py``, DeepSpeed
0.19.8 ``runtime/zero/stage_1_and_2.py`` and ``stage3.py``, diffusers' ``JointTransformerBlock``, transformers'
``Qwen2_5_VLDecoderLayer``; which tensors autograd keeps was read off its hooks (``tests/planning/test_plan.py``).

Left out: the allocator's fragmentation, CUDA context and NCCL (see ``usable``), and passes without gradient (VAE,
visual tower), whose tensors are gone before those counted here exist.
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
BUCKET = 4 * 500_000_000  # reduce_bucket_size and allgather_bucket_size, DeepSpeed's default, always of full size
LIVE = 1_000_000_000  # stage3_max_live_parameters: most parameters ZeRO-3 holds gathered
PREFETCH = 50_000_000  # stage3_prefetch_bucket_size: those it gathers ahead
PERSISTENT = 100_000  # stage3_param_persistence_threshold: smaller parameters stay whole


def usable(gpu_gib: int) -> int:
    """Bytes of a GPU that a plan may fill: less 2 GiB for CUDA context and NCCL, and 5 % that fragmentation takes.

    Both are experience from elsewhere, not measured here.
    """
    return int((gpu_gib * 0.95 - 2) * GIB)


# ---- States: what lies in memory between two batches ----


@dataclass(frozen=True)
class Parameters:
    """Sizes of a model's parameters in elements.

    matrices, vectors: trained ones of 2 and more, and of fewer dimensions: the two groups of the optimizer.
    frozen: those ZeRO-3 splits as well. whole: elements of frozen parts it does not (the VAE, buffers). reference:
    of the KL reference, which the learner alone has, whole.
    """

    matrices: tuple[int, ...]
    vectors: tuple[int, ...]
    frozen: tuple[int, ...]
    whole: int = 0
    reference: int = 0

    @classmethod
    def of(cls, model: UnifiedModel, stage: str) -> Parameters:
        """Of a model, on any device, whose `stage` begins: that is what it trains from now on."""
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
    """Bytes on each GPU between two batches, and what comes and goes with the optimizer step and the export.

    ``gradients`` are kept from the first micro-batch to the step. ``buffers``: communication, there during a batch.
    ``step``: second copy of the gradients, AdamW's temporary, the all-gather. ``export``: the whole model, which every
    rank loads before ZeRO-3 splits it and gathers again to write the result. ``host``: bytes of main memory a rank
    needs for an offloaded optimizer.
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

    With T trained elements, in fp32: stage 0 keeps 4T weights, 4T gradients and 8T moments. Stages 1 and 2 flatten each
    group, padded to a multiple of 2 x workers, and split a copy of it (4T/W) and its moments (8T/W); gradients are
    4T whole in stage 1 (and a split copy at the step), in stage 2 the share of those parameters that begin, end or lie
    in the rank's part. Stage 3 splits every parameter, rounded up, frozen ones too. An offloaded optimizer keeps copy,
    moments and gradients in main memory (24 bytes an element: two buffers more for accumulating and for the way back).
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
        # Persistent parameters are among the live ones as long as not everything fits.
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
    step = max(FP32 * share, BUCKET)  # the flattened gradients, then AdamW's temporary in their place, then all-gather
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
    """Bytes of a number, by where it occurs. Autocast decides them, and not the same way on every device.

    matrix: inputs and outputs of linear layers. norm: of LayerNorm (CUDA's autocast runs it in fp32). attention:
    query, key and value as the attention kernel keeps them (``models.attention.attend``: fp32 on a CPU). dropout: its
    mask. casts: bf16 copies the q, k and v projections make of one fp32 input.
    """

    matrix: int
    norm: int
    attention: int
    dropout: int
    casts: int

    @property
    def cast(self) -> int:
        """Of the bf16 copy that autocast makes of a weight; 0 when the weight itself is used."""
        return self.matrix if self.matrix < FP32 else 0


CUDA_BF16 = Numbers(matrix=2, norm=4, attention=2, dropout=1, casts=3)
CUDA_FP32 = Numbers(matrix=4, norm=4, attention=4, dropout=1, casts=1)
CPU_BF16 = Numbers(matrix=2, norm=2, attention=4, dropout=4, casts=1)
CPU_FP32 = Numbers(matrix=4, norm=4, attention=4, dropout=4, casts=1)


def _attention(n: Numbers, trained: bool, joint: bool) -> int:
    """Bytes for each channel of a token in an SD3 attention, from the projections' inputs to its output projection.

    q and k: the projection's output, RMSNorm's fp32 copy of it (if it is not fp32 already), the product its trained
    weight multiplies, and what the kernel keeps. v and the output: what the kernel keeps. Of the output the joint
    attention slices off a copy for its projection. The S x S matrix is never kept.
    """
    normed = n.matrix + (FP32 if n.matrix < FP32 else 0) + (FP32 if trained else 0) + n.attention
    kept = 2 * normed + 2 * n.attention
    if trained:
        copied = n.matrix if joint or n.attention != n.matrix else 0
        kept += n.casts * n.matrix + copied
    return kept + n.matrix  # the gate multiplies the projected output


def _stream(n: Numbers, trained: bool, dual: bool, width: int) -> int:
    """Bytes a token of one stream (image or context) costs in a joint block: two LayerNorms, attention, MLP of 4."""
    norms = 4 * n.norm  # input and output, twice: the modulation multiplies the output
    mlp = 4 * n.matrix + n.matrix + (n.matrix + 4 * n.matrix if trained else 0)  # GELU's input, output; linears' inputs
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
    """Bytes the DiT keeps for the backward pass of one micro-batch.

    image_tokens: targets and references of one sample; context_tokens: its prompt, image and think tokens. Without
    ``trained`` the gradient only passes through: linear layers keep no inputs, but those of frozen weights keep the
    bf16 copy that autocast has made, counted here because nothing else holds it. With checkpointing
    a block keeps its two inputs, and one block at a time is computed again.
    """
    dit = architecture.transformer
    width = dit["num_attention_heads"] * dit["attention_head_dim"]
    layers, dual = dit["num_layers"], len(dit["dual_attention_layers"])
    image, context = batch * image_tokens, batch * context_tokens
    plain_block = image * _stream(n, trained, False, width) + context * _stream(n, trained, False, width)
    dual_block = plain_block + image * width * _attention(n, trained, joint=False)
    # The last block gives no context back: norm, projections and attention alone.
    last_context = 2 * n.norm + _attention(n, trained, joint=True) - n.matrix - (n.matrix if trained else 0)
    last = image * _stream(n, trained, False, width) + context * width * last_context
    casts = 0 if trained else n.cast * dit_linears(architecture)
    ends = context * (architecture.context_dim * n.matrix if trained else 0) + image * width * (2 * n.norm + n.matrix)
    if checkpointing:
        largest = dual_block if dual else plain_block
        return layers * (image + context) * width * n.matrix + largest + casts // layers + ends
    return (layers - 1 - dual) * plain_block + dual * dual_block + last + casts + ends


def dit_linears(architecture: Architecture) -> int:
    """Elements of the weights of the DiT's linear layers, nearly all it has (modulation included)."""
    dit = architecture.transformer
    width = dit["num_attention_heads"] * dit["attention_head_dim"]
    layers, dual = dit["num_layers"], len(dit["dual_attention_layers"])
    block = 2 * (4 + 8 + 6) * width**2  # image and context: attention, MLP, modulation
    return layers * block + dual * (4 + 3) * width**2 - (1 + 8 + 4) * width**2


def bridge_activations(architecture: Architecture, n: Numbers, *, batch: int, context_tokens: int) -> int:
    """Bytes the trained bridge keeps: connector blocks, which are never checkpointed, and the projectors' inputs.

    A block, for each token: both LayerNorms' inputs, the projections' inputs, q, k, v and output of the attention, and
    three of the MLP.
    """
    hidden, mlp = architecture.connector_hidden, architecture.connector_mlp
    attention = 4 * n.attention + (n.matrix if n.attention != n.matrix else 0)
    block = hidden * (2 * n.norm + n.casts * n.matrix + attention + n.matrix) + 2 * mlp * n.matrix
    ends = n.matrix * (architecture.vlm_hidden * len(architecture.fusion_layers) + hidden)
    return batch * context_tokens * (architecture.connector_layers * block + ends)


def vlm_activations(
    architecture: Architecture, n: Numbers, *, batch: int, context_tokens: int, lora_rank: int, checkpointing: bool
) -> int:
    """Bytes the VLM's decoder keeps when a gradient passes through it: to the think tokens, or to its LoRA.

    Its residual stream is fp32, for embeddings are. A layer, for each token: the inputs of both RMSNorms (fp32), q, k,
    v (repeated to all heads) and output of the attention, three of the MLP's inner tensors. The base weights are
    frozen: their layers keep no inputs, but autocast's copy of the weight. A LoRA keeps, for each of its seven layers,
    dropout's mask, the input's copy and the rank's. Only layers below the deepest state the bridge reads run.
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
    """Elements of the weights of one decoder layer's seven linear layers."""
    text = architecture.vlm["text_config"]
    hidden = int(text["hidden_size"])
    kv = text["num_key_value_heads"] * hidden // text["num_attention_heads"]
    return 2 * hidden**2 + 2 * hidden * kv + 3 * hidden * int(text["intermediate_size"])
