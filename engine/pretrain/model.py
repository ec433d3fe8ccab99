"""Language models: transformers' GPT-NeoX and Llama by shape, and the losses that are asked of them."""

from __future__ import annotations

import copy
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from torch import nn

from mates.engine.config import RecipeError
from mates.engine.pretrain.shapes import NEOX_ROPE, ModelShape
from mates.engine.random import key_of
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, fingerprint_of

RESIDUAL = ("dense.weight", "dense_4h_to_h.weight", "o_proj.weight", "down_proj.weight")
"""Endings of the names of matrices whose products are added to the residual stream."""


def padded_vocabulary(vocab_size: int, multiple: int) -> int:
    """Rows of the embedding: ``vocab_size`` rounded up."""
    return -(-vocab_size // multiple) * multiple


def model_config(shape: ModelShape, vocab_size: int, end_of_document: int) -> Any:
    """The transformers configuration of a shape. RecipeError where transformers refuses its settings."""
    from transformers import GPTNeoXConfig, LlamaConfig

    common = {
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": shape.tie_embeddings,
        "bos_token_id": end_of_document,
        "eos_token_id": end_of_document,
        "use_cache": False,
    }
    settings = copy.deepcopy(shape.settings)  # transformers writes into what it is given
    if shape.family == "gpt_neox" and not {"rope_parameters", "rotary_pct", "rotary_emb_base", "rope_scaling"} & set(settings):
        settings["rope_parameters"] = dict(NEOX_ROPE)
    if shape.family == "llama":
        settings["num_key_value_heads"] = shape.kv_heads
    try:
        config = (GPTNeoXConfig if shape.family == "gpt_neox" else LlamaConfig)(**settings, **common)
    except Exception as error:  # of many kinds, by what a user's file says
        raise RecipeError(f"transformers refuses this configuration ({type(error).__name__}: {error})") from error
    for name, value in (getattr(config, "rope_parameters", None) or {}).items():
        if isinstance(value, int | float) and not value > 0:
            raise RecipeError(f"the rotary embedding's {name}: found {value}, expected a number above 0")
    return config


def build_model(config: Any, seed: int) -> nn.Module:
    """A freshly initialised fp32 model on the CPU; equal configurations and seeds give equal weights.

    Weights are those of Pythia (GPT-NeoX's ``small_init`` and ``wang_init``): normal with variance 2 / (5 d) (Nguyen & Salazar, arXiv
    1910.05895), and with standard deviation 2 / (layers · sqrt(d)) where a block writes into the residual stream; biases are 0, norms 1.
    """
    model = build_uninitialised(config)
    small, written = math.sqrt(2 / (5 * config.hidden_size)), 2 / (config.num_hidden_layers * math.sqrt(config.hidden_size))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            source = torch.Generator().manual_seed(_number(seed, f"weights {name}"))
            parameter.normal_(0.0, written if name.endswith(RESIDUAL) else small, generator=source)
    return model


def build_uninitialised(config: Any) -> nn.Module:
    """An fp32 model on the CPU whose weights are whatever was in memory, for what overwrites all of them."""
    model = build_empty(config, torch.float32, torch.device("cpu"))
    memory = {id(parameter): nn.Parameter(torch.empty_like(parameter, device="cpu")) for parameter in model.parameters()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, memory[id(parameter)])  # tied embeddings stay one
    return model


def _number(seed: int, purpose: str) -> int:
    return int.from_bytes(b"".join(part.to_bytes(4, "little") for part in key_of(seed, purpose)), "little") >> 1


def build_empty(config: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model whose weights take no memory, on the meta device; its buffers are real and on ``device``.

    Raises:
        RecipeError: transformers makes none of the configuration.
    """
    from transformers import AutoModelForCausalLM

    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size = 1, 8
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
        with torch.random.fork_rng(devices=[]):  # the random weights of this one are of no use, and no draw of the global generator
            buffers = dict(AutoModelForCausalLM.from_config(small, attn_implementation="sdpa", dtype=dtype).named_buffers())
    except Exception as error:  # of many kinds, by what a user's file says
        raise RecipeError(f"transformers makes no model of this configuration ({type(error).__name__}: {error})") from error
    for name, _ in list(model.named_buffers()):
        owner, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(owner), own_name, buffers[name].to(device))
    return model


def build_from_weights(config: Any, directory: Path) -> nn.Module:
    """The fp32 model of a configuration on the CPU, with the weights of a Hugging Face folder. Nothing is unpickled.

    Raises:
        ArtifactError: no safetensors, damaged ones, or tensors that are not those of the model or not finite.
    """
    from transformers import AutoModelForCausalLM

    check_weights(directory)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=torch.float32,
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # said below
        )
    except Exception as error:  # of many libraries and kinds
        raise ArtifactError(f"{directory}: transformers cannot load its weights ({type(error).__name__}: {error})") from error
    for name, held, expected in sorted(found["mismatched_keys"]):
        advice = (
            "; rows of embeddings are the tokenizer's vocabulary rounded up to model.vocab_multiple: use the tokenizer that the weights "
            "were trained with, and a multiple that gives their rows"
            if held[1:] == expected[1:] and ("embed" in name or "lm_head" in name)
            else "; its config.json is of another model"
        )
        raise ArtifactError(f"{directory}: {name} is {tuple(held)}, expected {tuple(expected)}{advice}")
    for kind, words in (("missing_keys", "lacks"), ("unexpected_keys", "holds, beyond the model's tensors,")):
        if found[kind]:
            raise ArtifactError(f"{directory}: {words} {', '.join(sorted(found[kind])[:3])} ({len(found[kind])} in all)")
    result: nn.Module = model
    expected_names = {name for name, _ in build_empty(config, torch.float32, torch.device("cpu")).named_parameters()}
    if extra := {name for name, _ in result.named_parameters()} - expected_names:
        raise ArtifactError(
            f"{directory}: config.json says tie_word_embeddings, but {min(extra)} is not the input embedding; set it to false there, or "
            f"remove {min(extra)}"
        )
    for name, parameter in result.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ArtifactError(f"{directory}: {name} holds values that are not finite")
    return result


def check_weights(directory: Path) -> None:
    """Read the headers of a Hugging Face folder's weights.

    Raises:
        ArtifactError: there are none, one is damaged or missing, or a tensor does not hold floating-point numbers.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        raw = artifact.read_json(index)
        names = set(raw["weight_map"].values()) if isinstance(raw, dict) and isinstance(raw.get("weight_map"), dict) else {None}
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ArtifactError(f"{index}: no index of the safetensors files beside it")
        files = [directory / str(name) for name in sorted(names, key=str)]
    else:
        files = [directory / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise ArtifactError(f"{file}: not there; load the model with transformers and save it with save_pretrained")
        try:
            with safe_open(file, framework="pt") as handle:
                dtypes = {name: handle.get_slice(name).get_dtype() for name in handle.keys()}  # noqa: SIM118 - no mapping
        except SafetensorError as error:
            raise ArtifactError(f"{file}: not a readable safetensors file ({error})") from error
        for name, dtype in dtypes.items():
            if dtype not in ("F64", "F32", "F16", "BF16"):
                raise ArtifactError(f"{file}: {name} is {dtype}, expected floating-point numbers; quantized weights cannot be trained on")


def weights_fingerprint(directory: Path) -> str:
    """What names the weights of a Hugging Face folder: the contents of its configuration, index and safetensors files."""
    check_weights(directory)
    files = [directory / "config.json", *directory.glob("*.safetensors.index.json"), *directory.glob("*.safetensors")]
    return fingerprint_of([[file.name, _digest_of(file, *_identity(file))] for file in sorted(files)])


def _identity(file: Path) -> tuple[int, int, int]:
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


@lru_cache(maxsize=4096)
def _digest_of(file: Path, *identity: int) -> str:
    """Of a file's contents, read once by a process as long as it is the same file."""
    digest: str = blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest()
    return digest


def reset_at_documents(model: nn.Module, end_of_document: int) -> None:
    """Let no token see the documents before its own: positions count from 0 in each document of a window, and attention ends at its start.

    An end-of-document token belongs to the document before it. Only calls without ``position_ids`` are changed.
    """

    def add_positions(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if named.get("position_ids") is None:
            named["position_ids"] = document_positions(named["input_ids"], end_of_document)
        return arguments, named

    model.register_forward_pre_hook(add_positions, with_kwargs=True)


def document_positions(tokens: torch.Tensor, end_of_document: int) -> torch.Tensor:
    """Position of each token in its document: tokens [B, T] int64 → [B, T] int64.

    Transformers reads positions that do not go up by one as the seams of packed sequences, and masks attention there.
    """
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    is_first = torch.nn.functional.pad(tokens[:, :-1] == end_of_document, (1, 0))
    return places - torch.cummax(torch.where(is_first, places, 0), 1).values


def next_token_loss(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of predicting each next token: windows [B, L + 1] int64 → scalar, fp32 (fp64 for an fp64 model)."""
    logits = at_least_fp32(model(input_ids=windows[:, :-1]).logits)
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def token_losses(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of each next token: windows [B, L + 1] int64 → [B, L], fp32 (fp64 for an fp64 model)."""
    logits = at_least_fp32(model(input_ids=windows[:, :-1]).logits)
    return nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")


class FusedHead(nn.Linear):
    """An output embedding that can give the loss instead of logits, piece by piece, so that the logits are never held as a whole.

    By Liger Kernel (Hsu et al., arXiv 2410.10989), with losses and the sum of the weight's gradient in fp32.
    """

    targets: torch.Tensor | None = None

    @classmethod
    def of(cls, model: nn.Module) -> FusedHead:
        """The output embedding of a model, which becomes one of these in place."""
        head: nn.Linear = model.get_output_embeddings()  # type: ignore[operator]
        head.__class__ = cls
        assert isinstance(head, cls)
        return head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, D] → logits [B, T, V], or the mean loss in nats where there are ``targets`` [B · T]."""
        if self.targets is None:
            return super().forward(hidden)
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        weight = self.weight.to(hidden.dtype)  # under autocast weights are fp32 and hidden states bf16
        loss: torch.Tensor = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)(weight, hidden.flatten(0, 1), self.targets)
        return loss

    def next_token_loss(self, model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
        """:func:`next_token_loss` of the model whose head this is."""
        self.targets = windows[:, 1:].flatten()
        try:
            loss: torch.Tensor = model(input_ids=windows[:, :-1]).logits.float()
            return loss
        finally:
            self.targets = None


def at_least_fp32(values: torch.Tensor) -> torch.Tensor:
    """bf16 to fp32; fp32 and fp64 as they are."""
    return values if values.dtype == torch.float64 else values.float()


class LabelledLoss(nn.Module):
    """Losses at label positions only: the output embedding is applied to them and to no other position.

    Sequences are padded on the right and no mask is needed: attention is causal, so no position sees the padding after it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses and hits.

        Args:
            tokens: [B, T] int64. positions: [P], flat positions (row · T + column) that carry a label. targets: [P] int64.

        Returns:
            [P] cross-entropy in nats (fp32, fp64 for an fp64 model), and [P] bool, whether the target is the likeliest token.
        """
        hidden = self.model.base_model(input_ids=tokens).last_hidden_state  # type: ignore[operator]
        logits = self.model.get_output_embeddings()(hidden.flatten(0, 1)[positions])  # type: ignore[operator]
        return nn.functional.cross_entropy(at_least_fp32(logits), targets, reduction="none"), logits.argmax(-1) == targets
