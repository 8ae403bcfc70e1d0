"""What of ours stands on the cards and above them, as HTML. Texts come from files of strangers, so all is escaped."""

from __future__ import annotations

from html import escape
from typing import Any

MOST_WORDS = 8
_STALE = (
    '<p class="locon-notes locon-stale-note">Another model is loaded than when these cards were listed: refresh to see '
    "what fits it.</p>"
)


def with_notes(page: str, abouts: list[dict[str, Any]], model: str) -> str:
    """The page with lines about what is not shown. `model` is the family of the model that the cards are listed for."""
    return f'<div class="locon-page" data-locon-model="{escape(model)}">{_STALE}{_notes(abouts)}{page}</div>'


def badges(about: dict[str, Any]) -> str:
    """What stands on a card's picture."""
    texts = [about["family"], f"rank {about['rank']}" if about["rank"] else "", about["base"]]
    html = "".join(f'<span class="locon-badge">{escape(badge)}</span>' for badge in texts if badge)
    if about["problem"]:
        what = "does not fit" if about["fits"] is False else "cannot be used"
        html += f'<span class="locon-badge locon-problem" title="{escape(about["problem"])}">{what}</span>'
    elif about["unread"]:
        why = f"{about['unread']} keys of the file are not understood; all others are used"
        html += f'<span class="locon-badge locon-warning" title="{escape(why)}">{about["unread"]} keys unknown</span>'
    elif about["waiting"]:
        html += '<span class="locon-badge">being read…</span>'
    words = ", ".join(about["triggers"][:MOST_WORDS])
    more = "\n".join(filter(None, (size(about["size"]), f"trained on: {words}" if words else "")))
    return f'<div class="locon-badges" title="{escape(more)}">{html}</div>'


def size(length: int) -> str:
    """That of a file, for people."""
    return f"{length / 1e6:.1f} MB" if length >= 1e6 else f"{length / 1e3:.1f} kB"


def _notes(abouts: list[dict[str, Any]]) -> str:
    hidden, waiting = (sum(about[key] for about in abouts) for key in ("hidden", "waiting"))
    parts = []
    if hidden:
        what = "1 adapter for another model is" if hidden == 1 else f"{hidden} adapters for other models are"
        parts.append(f'{what} hidden. <button type="button" class="locon-show-hidden">Show</button>')
    if waiting:
        what = "1 file is" if waiting == 1 else f"{waiting} files are"
        parts.append(f"{what} being read in the background; refresh to see more about them.")
    return f'<p class="locon-notes">{" ".join(parts)}</p>' if parts else ""
