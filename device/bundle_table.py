"""`understudy bundle show`: a manifest for a person, as a table.

What the policy moves and sees, how its actions come about and follow each other, where it is from, and what export
measured when it compared it with the original. The command prints it; nothing on the way of the data reads it.
"""

from __future__ import annotations

from rich.table import Table

from device.bundle import Manifest


def describe(manifest: Manifest) -> Table:
    """The manifest for a person, as a rich table."""
    table = Table("what", "value", title="policy bundle", show_lines=False)
    hand_over: str = manifest.handoff.method
    if manifest.handoff.m is not None:
        hand_over += f" (m = {manifest.handoff.m:g})"
    if manifest.handoff.advance is not None:
        hand_over += f", a chunk every {manifest.handoff.advance} actions"
    source, fidelity = manifest.provenance, manifest.fidelity
    chunk_s = manifest.chunk_size / manifest.action_rate_hz
    rows = [
        ("family", manifest.family),
        ("joints", "\n".join(f"{joint.name}  {joint.unit.value}" for joint in manifest.joints)),
        ("cameras", "\n".join(f"{c.name}  {c.width}x{c.height}" for c in manifest.cameras) or "none"),
        ("state values", str(manifest.state_size)),
        ("environment state", "none" if manifest.environment_state is None else str(manifest.environment_state)),
        ("chunk", f"{manifest.chunk_size} actions at {manifest.action_rate_hz:g} Hz ({chunk_s:.2f} s)"),
        ("observation steps", str(manifest.observation_steps)),
        *_sampler_rows(manifest),
        ("hand-over", hand_over),
        ("two-state joints", ", ".join(manifest.two_state_joints) or "none"),
        ("checkpoint", f"{source.checkpoint} ({source.policy_type}, {source.source_layout})"),
        ("weights sha256", source.checkpoint_sha256),
        ("dataset", source.dataset or "not known"),
        ("exported", f"{source.exported_at} by understudy {source.exporter}"),
        ("stored weights", fidelity.weights),
        ("precision", fidelity.precision),
        ("largest error", f"{fidelity.max_error:.2g} against PyTorch, {fidelity.max_rounding_error:.2g} from rounding"),
        *_joint_error_rows(manifest),
        ("files", "\n".join(manifest.files)),
    ]
    for what, value in rows:
        table.add_row(what, value)
    return table


def _sampler_rows(manifest: Manifest) -> list[tuple[str, str]]:
    sampler = manifest.sampler
    if sampler is None:
        return []
    steps = f"{sampler.steps} {sampler.spacing} steps" if sampler.steps > 1 else "1 step"
    kind = f"{sampler.solver}, {steps}" + (", distilled" if sampler.distilled else "")
    noise = "noise at the start and in between" if sampler.draws_noise else "noise at the start only"
    last = sampler.first_action + manifest.chunk_size - 1
    horizon = f"{sampler.horizon} actions, of which {sampler.first_action} to {last} are the chunk"
    return [("sampler", f"{kind}; {noise}"), ("horizon", horizon)]


def _joint_error_rows(manifest: Manifest) -> list[tuple[str, str]]:
    errors = manifest.fidelity.joint_errors
    if not errors:
        return []
    lines = [
        f"{joint.name}  {error:.2g} {joint.unit.value}" for joint, error in zip(manifest.joints, errors, strict=True)
    ]
    return [(f"error against fp32 on {manifest.fidelity.observations} observations", "\n".join(lines))]
