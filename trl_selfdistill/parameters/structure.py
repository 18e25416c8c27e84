# SPDX-License-Identifier: Apache-2.0
"""Which of five groups each parameter of a causal language model belongs to, and in which layer it sits.

- `norm`: modules whose class is a normalisation, wherever they are: q_norm and k_norm of an attention too.
- `lm_head`: the output embeddings and the head around them. Tied ones are counted in `embeddings`.
- `embeddings`: the input embeddings, learned positions, projections beside the blocks.
- `attention`: all of a softmax or linear attention: projections, latent projections, biases, sinks.
- `mlp`: the rest of a block: dense MLP, experts, routers, layer scales, and what mixes the sequence without being
  attention (state-space, recurrent and convolution mixers: a Mamba model has no `attention`).

Decided by the embedding modules, the lists of blocks and the classes of the modules in them, for every architecture of
transformers, and most remote code. The rest, such as a vision tower, has no group.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel


GROUPS = ("embeddings", "attention", "mlp", "norm", "lm_head")

# The class of an attention ends like this (`JambaAttentionDecoderLayer` is a block), or else the attribute that holds
# it: a `self_attn` may be a `LongcatFlashMLA`, and `linear_attn` is a `Qwen3NextGatedDeltaNet`.
_ATTENTION = re.compile(r"(attention|attn)\d*$", re.IGNORECASE)


class ParameterName(NamedTuple):
    """A name of a parameter, its group (`None` if it has none) and the index of the block that it is in, if any."""

    name: str
    group: str | None
    layer: int | None


def keep_trainable(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights in evaluation mode on a CPU: that layout has no backward."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def base_causal_lm(model: nn.Module) -> PreTrainedModel:
    """The `transformers` model itself, without a PEFT wrapper around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def named_tensors(model: PreTrainedModel) -> Iterator[tuple[nn.Parameter, list[ParameterName]]]:
    """Each parameter once, in the order of `model.named_parameters()`, with all its names: a tied one has several."""
    structure = _Structure(model)
    tensors: dict[int, tuple[nn.Parameter, list[ParameterName]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensors.setdefault(id(parameter), (parameter, []))[1].append(structure.locate(name))
    yield from tensors.values()


def group_of(names: list[ParameterName]) -> str | None:
    """The group to count a parameter in that has these names: that of the first, and `embeddings` before `lm_head`."""
    groups = [name.group for name in names]
    return "embeddings" if "embeddings" in groups else groups[0]


def _is_block_list(module: nn.Module) -> bool:
    # A block is made of several modules. That leaves out lists of projections (Gemma 3n's `altup_projections`).
    return isinstance(module, nn.ModuleList) and any(next(block.children(), None) is not None for block in module)


def _holds_blocks(module: nn.Module) -> bool:
    return any(map(_is_block_list, module.modules()))


class _Structure:
    """The landmarks of a model, from which the group and the layer of a parameter follow."""

    def __init__(self, model: PreTrainedModel):
        self.modules = dict(model.named_modules(remove_duplicate=False))
        # `get_decoder` gives ModernBERT-decoder's head, an attribute `decoder`; in transformers 4 an Electra itself
        decoder = model.get_decoder()
        self.decoder = decoder if decoder is not model and _holds_blocks(decoder) else model.base_model
        self.embeddings = self._with_companions(model.get_input_embeddings())
        self.lm_head = self._with_companions(model.get_output_embeddings())

    def _with_companions(self, module: nn.Module | None) -> nn.Module | None:
        """`module`, or the module around it if that holds no blocks (BERT's `embeddings` and `cls.predictions`)."""
        for path, other in self.modules.items():
            if other is module:
                parent = self.modules[path.rpartition(".")[0]]
                return module if _holds_blocks(parent) else parent
        return None

    def locate(self, name: str) -> ParameterName:
        attributes = name.split(".")[:-1]
        path = [self.modules[".".join(attributes[:depth])] for depth in range(len(attributes) + 1)]
        indices = (i for module, i in zip(path, attributes, strict=False) if _is_block_list(module))
        layer = next(map(int, indices), None)  # the outermost one: experts are lists of modules too
        return ParameterName(name, self._group(path, attributes, layer), layer)

    def _group(self, path: list[nn.Module], attributes: list[str], layer: int | None) -> str | None:
        def inside(module: nn.Module | None) -> bool:
            return any(module is outer for outer in path)

        head = inside(self.lm_head) or attributes[:1] in (["lm_head"], ["generator_predictions"])  # ModernBERT/Electra
        landmark = "lm_head" if head else "embeddings" if inside(self.embeddings) else None
        if landmark is None and not inside(self.decoder):
            return None  # a vision tower, a projector
        # By class, as shapes do not tell: the q_norm of Cohere has a 2-D weight. `InklingNormedEmbedding` is no norm
        if "norm" in type(path[-1]).__name__.lower() and not isinstance(path[-1], nn.Embedding):
            return "norm"
        if landmark is not None:
            return landmark
        classes = [type(module).__name__ for module in path[1:]]
        if any(map(_ATTENTION.search, [*classes, *attributes])):
            return "attention"
        if layer is not None:
            return "mlp"
        # Outside of the blocks are positions, and projections beside the blocks (OPT's `project_in`, Gemma 4's
        # `per_layer_model_projection`). What is further away (a vision tower inside of the decoder) gets no group.
        nearest = [module for module in path if not isinstance(module, nn.ModuleList)][-2:]
        beside = any(module is self.decoder or any(map(_is_block_list, module.children())) for module in nearest)
        return "embeddings" if beside or isinstance(path[-1], nn.Embedding) else None
