"""The walk: run a model joint, cached as in training, and in inference, and write down what there is on the way.

Every shape comes from a tensor of the run: returned by a method of the model, or kept by a hook on one of its modules.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from torchpi.model import flow
from torchpi.model.masks import make_attn_mask
from torchpi.model.pi0 import Pi0
from torchpi.trace.forward import Forward, Prefix, suffix_positions
from torchpi.trace.record import Recorder
from torchpi.trace.result import Modulation, Segment, Trace, Values
from torchpi.trace.steps import STEPS
from torchpi.trace.subject import Subject
from torchpi.types import Observation


@torch.no_grad()
def walk(subject: Subject, *, num_steps: int = 10) -> Trace:
    """Run everything and write it down.

    Args:
        num_steps: Euler steps of the inference.
    """
    model, recorder = subject.model, Recorder()
    observation = _observe(subject, recorder)
    prefix = Prefix(model, observation)
    times, states, cache_bytes = _infer(model, prefix, subject.noise[:1], num_steps, recorder)
    actions = states[-1].expand_as(subject.noise) if subject.actions is None else subject.actions
    recorder.tensor("0", "actions", actions, phase="training")
    forward = Forward(model, prefix, actions, noise=subject.noise, time=subject.time)
    forward.record(recorder)
    segments = _segments(model, observation, actions.shape[1])
    values = None
    if subject.real:
        chunk = torch.cat(states).cpu().numpy()
        values = Values(_images(observation), times, chunk, _modulation_over_time(model), forward.agreement())
    return Trace(
        title=subject.title,
        config=subject.config,
        batch=observation.batch_size,
        dtype=str(model.compute_dtype).removeprefix("torch."),
        notes=subject.notes,
        prompt=subject.prompt,
        action_names=subject.action_names,
        entries=recorder.entries(step.id for step in STEPS),
        segments=segments,
        mask=_joint_mask(model, observation, actions.shape[1]),
        cache_bytes=cache_bytes,
        parameters=_parameters(model),
        values=values,
        layers=forward.num_layers,
        time_inputs=forward.num_time_inputs,
        time_injections=forward.num_time_injections,
    )


# ---- steps 0 and 1 ----


def _observe(subject: Subject, recorder: Recorder) -> Observation:
    for name, tensor in _flat(subject.observation):
        recorder.tensor("0", name, tensor)
    observation = Observation.from_dict(subject.observation)
    parts: dict[str, Tensor | Mapping[str, Tensor]]
    parts = {"image": observation.images, "image_mask": observation.image_masks, "state": observation.state}
    for prompt in ("tokenized_prompt", "tokenized_prompt_mask"):
        parts[prompt] = getattr(observation, prompt)
    for name, tensor in _flat(parts):
        recorder.tensor("1", name, tensor)
    return observation


def _flat(observation: Mapping[str, Tensor | Mapping[str, Tensor]]) -> list[tuple[str, Tensor]]:
    flat = []
    for key, value in observation.items():
        flat += [(key, value)] if isinstance(value, Tensor) else [(f"{key}/{name}", t) for name, t in value.items()]
    return flat


def _first_sample(observation: Observation) -> Observation:
    return Observation(
        images={name: image[:1] for name, image in observation.images.items()},
        image_masks={name: mask[:1] for name, mask in observation.image_masks.items()},
        state=observation.state[:1],
        tokenized_prompt=observation.tokenized_prompt[:1],
        tokenized_prompt_mask=observation.tokenized_prompt_mask[:1],
    )


# ---- inference ----


def _infer(
    model: Pi0, prefix: Prefix, noise: Tensor, num_steps: int, recorder: Recorder
) -> tuple[list[float], list[Tensor], int]:
    """Prefill once, then Euler steps, for the first observation of the batch.

    Nothing is dropped, as `Pi0.sample_actions` drops padding, so that the shapes are those of training.

    Returns:
        The times; x before the first and behind every step; the cache's bytes.
    """

    def record(name: str, tensor: Tensor) -> None:
        recorder.tensor("inference", name, tensor, view="cached", phase="inference")

    observation = _first_sample(prefix.observation)
    prefix_tokens, prefix_mask = prefix.tokens[:1], prefix.mask[:1]
    ar_mask = torch.zeros_like(prefix_mask[0])
    cache = model.prefill(observation, (prefix_tokens, prefix_mask, ar_mask), action_horizon=noise.shape[1])
    record("prefix_tokens", prefix_tokens)
    for part, letter in enumerate("kv"):
        for i, key_value in enumerate(cache.key_values):
            record(f"cache/layer_{i}/{letter}", (key_value.keys, key_value.values)[part][:, : key_value.length])
    frame = cache.suffix
    x_t, dt, states = noise, -1.0 / num_steps, [noise]
    times = flow.euler_times(num_steps)
    for i, t in enumerate(times):
        time = torch.full((1,), t, device=noise.device)
        if i == 0 or not noise.is_meta:  # without values, all steps are the same
            suffix_tokens, suffix_mask, _, cond = model.embed_suffix(observation, x_t, time)
            v_t = model.denoise_step(cache, x_t, time)
        if i == 0:
            assert frame.mask is not None
            record("attn_mask", frame.mask)
            record("positions", suffix_positions(prefix_mask, suffix_mask))
            record("noise", noise)
            record("suffix_tokens", suffix_tokens)
            if cond is not None:
                record("adarms_cond", cond)
        record(f"time/t={t:.3g}", time)
        record(f"x_t/t={t:.3g}", x_t)
        record(f"v_t/t={t:.3g}", v_t)
        x_t = x_t + dt * v_t
        states.append(x_t)
    record("action_chunk", x_t)
    recorder.count("inference", "prefills", 1)
    recorder.count("inference", "euler_steps", len(times))
    return times, states, sum(part[:, :length].nbytes for *parts, length in cache.key_values for part in parts)


# ---- what a page or a table says about it all ----


def _segments(model: Pi0, observation: Observation, horizon: int) -> list[Segment]:
    """What stands where in the joint sequence."""
    ar_mask = model.suffix.ar_mask(horizon, torch.device("cpu"))
    groups = torch.cumsum(ar_mask, dim=0).tolist()
    num_state = model.suffix.num_state_tokens
    parts = [(camera, model.config.num_patches, 0) for camera in observation.images]
    parts.append(("prompt", observation.tokenized_prompt.shape[1], 0))
    if num_state:
        parts.append(("state", num_state, groups[0]))
    parts.append(("actions", len(groups) - num_state, groups[-1]))
    segments, start = [], 0
    for label, count, group in parts:
        segments.append(Segment(label, start, start + count, group))
        start += count
    return segments


def _joint_mask(model: Pi0, observation: Observation, horizon: int) -> np.ndarray:
    """The joint mask of the first sample; without values, of one whose tokens are all real."""
    masks = [mask[:1, None].expand(-1, model.config.num_patches) for mask in observation.image_masks.values()]
    prefix_mask = torch.cat([*masks, observation.tokenized_prompt_mask[:1]], dim=1)
    prefix_mask = torch.ones(prefix_mask.shape, dtype=torch.bool) if prefix_mask.is_meta else prefix_mask.cpu()
    ar_mask = model.suffix.ar_mask(horizon, torch.device("cpu"))
    input_mask = torch.cat([prefix_mask, torch.ones(1, len(ar_mask), dtype=torch.bool)], dim=1)
    bidirectional = torch.zeros(prefix_mask.shape[1], dtype=torch.bool)
    return make_attn_mask(input_mask, torch.cat([bidirectional, ar_mask]))[0].numpy()


def _images(observation: Observation) -> dict[str, np.ndarray | None]:
    images: dict[str, np.ndarray | None] = dict.fromkeys(observation.images)
    for name, image in observation.images.items():
        if observation.image_masks[name][0]:
            images[name] = ((image[0] + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    return images


def _modulation_over_time(model: Pi0, num_times: int = 41) -> Modulation | None:
    times = torch.linspace(1, 0, num_times, device=model.device)
    modulations = model.time_conditioning(times).modulations
    if modulations is None:
        return None
    parts = [torch.stack(part) for part in zip(*(m.chunk(3, dim=-1) for m in modulations), strict=True)]
    rms = [part.float().square().mean(dim=(2, 3)).sqrt().cpu().numpy() for part in parts]  # 3 × [norms, times]
    names = [f"layer {i}, {where}" for i in range(len(model.expert.layers)) for where in ("attention", "feed-forward")]
    return Modulation(times.tolist(), [*names, "final norm"], dict(zip(("scale", "shift", "gate"), rms, strict=True)))


def _parameters(model: Pi0) -> dict[str, int]:
    """How many parameters each part has."""
    parts = {"vision": "SigLIP", "embedding": "token embedding", "backbone": "backbone", "expert": "action expert"}
    norms, projections = "the expert's adaptive norms", "action, state and time projections"
    counts = dict.fromkeys([*parts.values(), norms, projections], 0)
    for name, parameter in model.named_parameters():
        root = name.partition(".")[0]
        part = norms if root == "expert" and ".dense." in name else parts.get(root, projections)
        counts[part] += parameter.numel()
    return {part: count for part, count in counts.items() if count}
