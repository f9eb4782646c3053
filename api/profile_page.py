"""A profile of steps as a page: two bars, and tables of the parts and the kernels."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halyard.runtime.profile import StepProfile

__all__ = ["profile_page"]

_COLOURS = {"plan": "#4878a8", "prepare": "#7aa6c2", "copies": "#b8a04c", "attention": "#c0573e",
            "GEMMs": "#3f7f5f", "norms and the rest": "#8fb996", "sampling": "#8b5e9e",
            "wait": "#c9c9c9", "commit": "#2f4858"}  # fmt: skip


def profile_page(profile: StepProfile, title: str) -> str:
    """A page of its own, without scripts or anything from elsewhere."""
    rows = profile.to_dict()
    whole = max(rows["milliseconds"], 1e-9)
    bars = []
    for where in ("host", "device"):
        if where not in rows:
            continue
        pieces = "".join(
            f'<i style="width:{100 * ms / whole:.3f}%;background:{_colour(name)}" '
            f'title="{escape(name)} {ms:.3f} ms"></i>'
            for name, ms in rows[where].items()
        )
        names = "".join(
            f'<tr><td><b style="background:{_colour(name)}"></b>{escape(name)}</td>'
            f"<td>{ms:.3f}</td><td>{ms / whole:.1%}</td></tr>"
            for name, ms in rows[where].items()
        )
        bars.append(
            f"<h2>{where}</h2><div>{pieces}</div><table><tr><th>part</th><th>ms a step</th>"
            f"<th>share</th></tr>{names}</table>"
        )
    kernels = "".join(
        f"<tr><td>{escape(name[:110])}</td><td>{1e3 * seconds / max(1, profile.steps):.3f}</td>"
        f"<td>{calls / max(1, profile.steps):.1f}</td></tr>"
        for name, seconds, calls in profile.kernels[:30]
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;"
        "padding:0 1rem;color:#222}div{display:flex;height:2.2rem;background:#f2f2f2}"
        "i{display:block;height:100%}table{border-collapse:collapse;margin:.8rem 0}"
        "td,th{padding:.15rem .8rem .15rem 0;text-align:left}td+td{text-align:right;"
        "font-variant-numeric:tabular-nums}b{display:inline-block;width:.8rem;height:.8rem;"
        "margin-right:.5rem}</style>"
        f"<h1>{escape(title)}</h1><p>{profile.steps} steps, {whole:.3f} ms each.</p>"
        + "".join(bars)
        + (
            "<h2>by kernel</h2><table><tr><th>name</th><th>ms a step</th><th>calls</th></tr>"
            f"{kernels}</table>"
            if kernels
            else ""
        )
        + "</html>\n"
    )


def _colour(part: str) -> str:
    return _COLOURS.get(part, "#e6e6e6")
