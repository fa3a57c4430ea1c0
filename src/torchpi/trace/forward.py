"""Steps 2 to 11: training's forward as the model computes it, the joint one beside it, and their tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from torchpi.joint import explicit_attention, joint_transformer
from torchpi.model import flow
from torchpi.model.gemma import AdaRMSNorm, Attention, KeyValue, Rope, rope_table
from torchpi.model.masks import make_attn_mask, token_positions
from torchpi.model.pi0 import Pi0
from torchpi.trace.record import Call, Recorder, calls_of
from torchpi.trace.result import Agreement
from torchpi.types import Observation

Calls = Mapping[str, list[Call]]

_STACKS = {"prefix": "backbone", "suffix": "expert"}
_OF_LAYER = (
    "pre_attention_norm",
    "attention.qkv",
    "attention.out",
    "pre_ffw_norm",
    "feed_forward.gate_up",
    "feed_forward.down",
    "feed_forward",
)  # the modules of layer 0, which is shown whole


class Prefix:
    """The embedded prefix of a batch, and the vision tower's calls."""

    def __init__(self, model: Pi0, observation: Observation) -> None:
        """Embed it."""
        self.observation = observation
        names = ["vision.patch_embed", "vision.blocks.0.qkv", "vision.blocks.0.fc1", "vision.head"]
        names += [f"vision.blocks.{i}" for i in range(len(model.vision.blocks))]
        with calls_of(model, names) as self.calls:
            self.tokens, self.mask, self.ar_mask = model.embed_prefix(observation)


class Forward:
    """Both forwards of one batch, with every tensor that a step shows."""

    def __init__(self, model: Pi0, prefix: Prefix, actions: Tensor, *, noise: Tensor, time: Tensor) -> None:
        """Run them.

        Args:
            actions, noise: [B, H, A].
            time: [B].
        """
        observation = prefix.observation
        self.model, self.prefix = model, prefix
        self.actions, self.noise, self.time = actions, noise, time
        with calls_of(model, _watched(model)) as self.calls:
            self.x_t, self.u_t = flow.interpolate(actions, noise, time)
            suffix = model.embed_suffix(observation, self.x_t, time)
            self.suffix_tokens, self.suffix_mask, self.suffix_ar_mask, self.cond = suffix
            conditioning = model.time_conditioning(time)
            whole = (self.prefix.tokens, self.prefix.mask, self.prefix.ar_mask)
            self.cache = model.prefill(observation, whole, action_horizon=actions.shape[1])
            self.frame = self.cache.suffix
            self.v_t = model.denoise_step(self.cache, self.x_t, conditioning)
        self.joint_attention: dict[str, Tensor] = {}
        with calls_of(model, _watched(model)) as self.joint_calls:
            self.joint = joint_transformer(
                model,
                (self.prefix.tokens, self.suffix_tokens.to(model.compute_dtype)),
                torch.cat([self.prefix.mask, self.suffix_mask], dim=1),
                torch.cat([self.prefix.ar_mask, self.suffix_ar_mask]),
                conditioning.modulations,
                record=self.joint_attention.__setitem__,
            )
        self._attention_agreement: list[Agreement] = []

    @property
    def num_layers(self) -> int:
        """Layers of the action expert that ran."""
        return sum(bool(self.calls[f"expert.layers.{i}"]) for i in range(len(self.model.expert.layers)))

    @property
    def num_time_inputs(self) -> int:
        """Modules that were handed the time: the norms of π₀.₅, the MLP in front of π₀'s expert."""
        return sum(bool(found) for name, found in self.calls.items() if name.endswith((".dense", "action_time_mlp_in")))

    @property
    def num_time_injections(self) -> int:
        """How many of them are in the layers."""
        return len(self._modulations_in_layers())

    def _modulations_in_layers(self) -> list[str]:
        return [name for name, found in self.calls.items() if name.endswith(".dense") and ".layers." in name and found]

    def agreement(self) -> list[Agreement]:
        """How far the joint forward and the model's own are apart; after `record`, and of real tensors only."""
        return [
            _agreement("suffix_out, joint and cached", self.joint.suffix_out, self.suffix_out),
            _agreement("v_t, joint and cached", self.joint.v_t, self.v_t),
            *self._attention_agreement,
        ]

    @property
    def suffix_out(self) -> Tensor:
        """The action expert's output, [B, T, d]."""
        output: Tensor = self.calls["expert"][0].output[0]
        return output

    def record(self, recorder: Recorder) -> None:
        """Write all tensors down."""
        _record_siglip(self.model, self.prefix, recorder)
        self._record_prefix(recorder)
        self._record_suffix(recorder)
        self._record_masks(recorder)
        for name, tensor in self.joint_attention.items():
            recorder.tensor("7-3" if name in "qkv" else "7-4", name, tensor, view="joint")
        _record_layer(self.model, self.joint_calls, "joint", recorder)
        _record_layer(self.model, self.calls, "cached", recorder)
        self._record_attention(recorder)
        self._record_all_layers(recorder)
        self._record_outputs(recorder)

    def _record_prefix(self, recorder: Recorder) -> None:
        recorder.tensor("3", "embedding_table", self.model.embedding)
        num_text = self.prefix.observation.tokenized_prompt.shape[1]
        recorder.tensor("3", "text_tokens", self.prefix.tokens[:, -num_text:])
        recorder.tensor("4", "prefix_tokens", self.prefix.tokens)
        recorder.tensor("4", "prefix_mask", self.prefix.mask)
        recorder.tensor("4", "prefix_ar_mask", self.prefix.ar_mask)

    def _record_suffix(self, recorder: Recorder) -> None:
        recorder.tensor("5", "noise", self.noise)
        recorder.tensor("5", "time", self.time)
        recorder.tensor("5", "x_t", self.x_t)
        recorder.tensor("5", "u_t", self.u_t, phase="training")
        recorder.tensor("5", "posemb_sincos", flow.posemb_sincos(self.time, self.model.config.action_expert.width))
        for name, _ in self.model.suffix.named_children():
            call = self.calls[f"suffix.{name}"][0]
            if name == "action_time_mlp_in":
                recorder.tensor("5", "action_and_time", call.args[0])
            recorder.tensor("5", name, call.output)
        if self.cond is not None:
            recorder.tensor("5", "adarms_cond", self.cond)
        recorder.tensor("5", "suffix_tokens", self.suffix_tokens)
        recorder.tensor("5", "suffix_mask", self.suffix_mask)
        recorder.tensor("5", "suffix_ar_mask", self.suffix_ar_mask)

    def _record_masks(self, recorder: Recorder) -> None:
        recorder.tensor("6", "attn_mask", self.joint.attn_mask, view="joint")
        recorder.tensor("6", "positions", self.joint.positions, view="joint")
        prefix_mask = make_attn_mask(self.prefix.mask, self.prefix.ar_mask)
        recorder.tensor("6", "prefix/attn_mask", prefix_mask, view="cached")
        recorder.tensor("6", "prefix/positions", token_positions(self.prefix.mask), view="cached")
        assert self.frame.mask is not None
        recorder.tensor("6", "suffix/attn_mask", self.frame.mask, view="cached")
        positions = suffix_positions(self.prefix.mask, self.suffix_mask)
        recorder.tensor("6", "suffix/positions", positions, view="cached")

    def _record_attention(self, recorder: Recorder) -> None:
        rope = rope_table(token_positions(self.prefix.mask), self.model.config.paligemma.head_dim)
        assert self.frame.mask is not None
        sides: tuple[tuple[str, Rope, Tensor, KeyValue | None], ...] = (
            ("prefix", rope, self.prefix.mask[:, None], None),
            ("suffix", self.frame.rope, self.frame.mask, self.cache.key_values[0]),
        )
        for side, rope, mask, past in sides:
            if self.calls[f"{_STACKS[side]}.layers.0.attention.out"]:
                explicit, kernel = _record_cached_attention(self.model, self.calls, side, rope, mask, past, recorder)
                if not kernel.is_meta:
                    what = f"layer 0 attention of the {side}, explicit and kernel"
                    self._attention_agreement.append(_agreement(what, explicit, kernel))

    def _record_all_layers(self, recorder: Recorder) -> None:
        for side, stack in _STACKS.items():
            for i in range(len(getattr(self.model, stack).layers)):
                for call in self.calls[f"{stack}.layers.{i}"]:
                    recorder.tensor("8", f"{side}/layer_{i}", call.output[0])
        for name in self._modulations_in_layers():
            _, _, layer, norm, _ = name.split(".")
            before = norm.removeprefix("pre_").removesuffix("_norm")  # attention or ffw
            recorder.tensor("8", f"modulation/layer_{layer}/{before}", self.calls[name][0].output)
        for part, letter in enumerate("kv"):
            for i, key_value in enumerate(self.cache.key_values):
                recorder.tensor(
                    "8", f"cache/layer_{i}/{letter}", (key_value.keys, key_value.values)[part][:, : key_value.length]
                )
        recorder.count("8", "layers", self.num_layers)
        recorder.count("8", "time_injections", self.num_time_injections)

    def _record_outputs(self, recorder: Recorder) -> None:
        recorder.tensor("9", "prefix_out", self.joint.prefix_out, view="joint")
        recorder.tensor("9", "suffix_out", self.suffix_out)
        for call in self.calls.get("expert.final_norm.dense", []):
            recorder.tensor("9", "modulation/final_norm", call.output)
        recorder.tensor("10", "action_out", self.calls["action_out_proj"][0].args[0])
        recorder.tensor("10", "v_t", self.v_t)
        recorder.tensor("11", "u_t", self.u_t, phase="training")
        recorder.tensor("11", "loss", (self.v_t - self.u_t).square().mean(dim=-1), phase="training")


def suffix_positions(prefix_mask: Tensor, suffix_mask: Tensor) -> Tensor:
    """Positions of the suffix's tokens behind a prefix, [B, T]."""
    return token_positions(torch.cat([prefix_mask, suffix_mask], dim=1))[:, prefix_mask.shape[1] :]


def _watched(model: Pi0) -> list[str]:
    """The modules whose calls the trace wants to see."""
    names = [f"suffix.{name}" for name, _ in model.suffix.named_children()]
    for stack in ("backbone", "expert"):
        layers = getattr(model, stack).layers
        names += [f"{stack}.layers.{i}" for i in range(len(layers))]
        names += [f"{stack}.layers.0.{name}" for name in _OF_LAYER]
        names.append(_next_norm(model, stack))
    names += [f"{name}.dense" for name, module in model.named_modules() if isinstance(module, AdaRMSNorm)]
    return [*names, "expert", "action_out_proj"]


def _next_norm(model: Pi0, stack: str) -> str:
    """The norm behind layer 0, whose input is what that layer returns."""
    return f"{stack}.layers.1.pre_attention_norm" if len(getattr(model, stack).layers) > 1 else f"{stack}.final_norm"


def _record_siglip(model: Pi0, prefix: Prefix, recorder: Recorder) -> None:
    """The vision tower. It runs all cameras as one batch; what belongs to one camera is shown as its own."""
    cameras, calls = list(prefix.observation.images), prefix.calls

    def record(name: str, batched: Tensor, *, all_cameras: bool = False) -> None:
        per_camera = batched.unflatten(0, (len(cameras), -1))
        for i, camera in enumerate(cameras if all_cameras else cameras[:1]):
            recorder.tensor("2", f"{name}/{camera}", per_camera[i])

    patch_embed, qkv = calls["vision.patch_embed"][0], calls["vision.blocks.0.qkv"][0]
    record("patches", patch_embed.args[0], all_cameras=True)
    record("patch_embedding", patch_embed.output)
    record("with_position_embedding", calls["vision.blocks.0"][0].args[0])
    for letter, part in zip("qkv", qkv.output.chunk(3, dim=-1), strict=True):
        record(f"layer_0/{letter}", part.unflatten(-1, (model.config.siglip.num_heads, -1)))
    record("layer_0/mlp_hidden", calls["vision.blocks.0.fc1"][0].output)
    for i in range(len(model.vision.blocks)):
        record(f"layer_{i}/out", calls[f"vision.blocks.{i}"][0].output)
    head = calls["vision.head"][0]
    record("final_norm", head.args[0])
    record("image_tokens", head.output, all_cameras=True)


def _record_layer(model: Pi0, calls: Calls, view: str, recorder: Recorder) -> None:
    """Layer 0 of both stacks, but for the attention itself. (A backbone's only layer runs in part.)"""
    for side, stack in _STACKS.items():
        first = {name: calls[f"{stack}.layers.0.{name}"][0] for name in _OF_LAYER if calls[f"{stack}.layers.0.{name}"]}

        def record(step: str, name: str, tensor: Tensor, side: str = side) -> None:
            recorder.tensor(step, f"{side}/{name}", tensor, view=view)

        def record_norm(step: str, call: Call) -> None:
            _, modulation = call.args
            if modulation is not None:
                for name, part in zip(("scale", "shift", "gate"), modulation.chunk(3, dim=-1), strict=True):
                    record(step, name, part)
            record(step, "normed", call.output[0])

        record("7-1", "x", first["pre_attention_norm"].args[0])
        record_norm("7-1", first["pre_attention_norm"])
        if "attention.out" not in first:
            continue
        attention = getattr(model, stack).layers[0].attention
        for letter, part in zip("qkv", _split_heads(attention, first["attention.qkv"].output), strict=True):
            record("7-2", letter, part)
        record("7-4", "attn_out", first["attention.out"].args[0])
        record("7-5", "attn_proj", first["attention.out"].output)
        record("7-6", "x", first["pre_ffw_norm"].args[0])
        record_norm("7-7", first["pre_ffw_norm"])
        record("7-7", "ffw_gate_up", first["feed_forward.gate_up"].output)
        record("7-7", "ffw_hidden", first["feed_forward.down"].args[0])
        record("7-7", "ffw_out", first["feed_forward"].output)
        for call in calls[_next_norm(model, stack)][:1]:
            record("7-7", "x_out", call.args[0])


def _split_heads(attention: Attention, qkv: Tensor) -> list[Tensor]:
    config = attention.config
    kv_width = config.num_kv_heads * config.head_dim
    return [
        part.unflatten(-1, (-1, config.head_dim)) for part in qkv.split([attention.q_width, kv_width, kv_width], dim=-1)
    ]


def _record_cached_attention(
    model: Pi0, calls: Calls, side: str, rope: Rope, mask: Tensor, past: KeyValue | None, recorder: Recorder
) -> tuple[Tensor, Tensor]:
    """The attention of layer 0 as the model computes it, once more without the kernel, which hides logits and weights.

    Returns:
        What comes out, and what came out of the kernel.
    """
    at = f"{_STACKS[side]}.layers.0"
    attention = model.get_submodule(f"{at}.attention")
    assert isinstance(attention, Attention)
    q, k, v = attention.project(calls[f"{at}.pre_attention_norm"][0].output[0], rope)
    q = q * q.shape[-1] ** -0.5  # the kernel does this inside
    for letter, part in (("q", q), ("k", k), ("v", v)):
        recorder.tensor("7-3", f"{side}/{letter}", part, view="cached")
    if past is not None:
        k, v = past.extended(k, v)
        recorder.tensor("7-4", f"{side}/k_with_cache", k, view="cached")
        recorder.tensor("7-4", f"{side}/v_with_cache", v, view="cached")
    out, logits, probs = explicit_attention(q, k, v, mask)
    recorder.tensor("7-4", f"{side}/logits", logits, view="cached")
    recorder.tensor("7-4", f"{side}/probs", probs, view="cached")
    return out, calls[f"{at}.attention.out"][0].args[0]


def _agreement(what: str, one: Tensor, other: Tensor) -> Agreement:
    return Agreement(what, (one.float() - other.float()).abs().max().item(), other.float().abs().max().item())
