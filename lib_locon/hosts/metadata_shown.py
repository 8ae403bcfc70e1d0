"""What the editor's window shows of a file, as HTML. Every text comes from files of strangers, so all is escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from html import escape
from typing import Any

from lib_locon.cards import Card
from lib_locon.facts import counted_words, is_count
from lib_locon.hosts.cards_shown import size

MOST_WORDS = 100
MOST_LETTERS = 300
"""Of one value of the metadata."""
_WRITTEN = {
    "ss_output_name": "Named by its trainer",
    "ss_sd_model_name": "Trained on",
    "ss_network_module": "Trained with",
    "ss_clip_skip": "Clip skip",
}


def sentence(text: str) -> str:
    """A line."""
    return f"<span>{escape(text)}</span>"


def preview(address: str | None) -> str:
    """The card's picture, or its place."""
    picture = f'<img src="{escape(address)}" class="preview">' if address else ""
    return f'<div class="card standalone-card-preview">{picture}</div>'


def facts_table(card: Card, metadata: Mapping[str, Any]) -> str:
    """The file's facts: what it is by its tensors, and what its trainer wrote."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in _facts(card, metadata) if value
    )
    return f'<table class="file-metadata">{rows}</table>'


def words(metadata: Mapping[str, Any]) -> str:
    """The words of the training captions, the commonest first. A click on one puts it into the activation text."""
    found = counted_words(metadata.get("ss_tag_frequency"))
    if not found:
        return ""
    buttons = "".join(_button(word, count) for word, count in found[:MOST_WORDS])
    more = f"<p>and {len(found) - MOST_WORDS} more</p>" if len(found) > MOST_WORDS else ""
    return f"<p>Training tags; a click puts one into the activation text, or takes it out:</p>{buttons}{more}"


def _button(word: str, count: int) -> str:
    shown = f"{escape(word)} <small>{count}</small>"
    return f'<button type="button" class="locon-word" data-word="{escape(word)}">{shown}</button>'


def _facts(card: Card, metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    identity, facts = card.identity, card.facts
    yield "File", f"{card.names[0]}{card.path.suffix}"
    yield "Size", size(identity.size)
    yield "Changed", _local_time(identity.mtime_ns / 1e9)
    yield "Family", card.family + (f", rank {card.rank}" if card.rank else "")
    if facts is not None:
        yield "Made for, by its tensors", facts.base
        yield "Not understood", f"{facts.unread} keys" if facts.unread else ""
        yield "Hash", card.hash[:12]
    yield "Cannot be used", card.problem
    for key, name in _WRITTEN.items():
        value = metadata.get(key)
        yield name, "" if value in (None, "None") else str(value)[:MOST_LETTERS]
    yield "Trained at", _day(metadata.get("ss_training_started_at"))
    yield "Pictures", _pictures(metadata.get("ss_dataset_dirs"))
    yield "Resolutions", _resolutions(metadata.get("ss_bucket_info"))


def _local_time(seconds: float) -> str:
    """Nothing for a time that no calendar has: a file may be given any."""
    try:
        return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return ""


def _day(seconds: Any) -> str:
    try:
        return datetime.fromtimestamp(float(seconds), timezone.utc).strftime("%Y-%m-%d")
    except (TypeError, ValueError, OverflowError, OSError):
        return ""


def _pictures(folders: Any) -> str:
    counts = [each.get("img_count") for each in _tables(folders)]
    total = sum(count for count in counts if is_count(count))
    return str(total) if total else ""


def _resolutions(info: Any) -> str:
    """Such as `512 × 768 (12)`, those with most pictures first."""
    found: dict[str, int] = {}
    for bucket in _tables(info.get("buckets") if isinstance(info, dict) else None):
        size, count = bucket.get("resolution"), bucket.get("count")
        if isinstance(size, list) and len(size) == 2 and is_count(count):
            name = " × ".join(str(side)[:9] for side in size)
            found[name] = found.get(name, 0) + count
    first = sorted(found.items(), key=lambda item: -item[1])[:4]
    return ", ".join(f"{name} ({count})" for name, count in first) + (", …" if len(found) > len(first) else "")


def _tables(value: Any) -> list[dict[str, Any]]:
    return [each for each in value.values() if isinstance(each, dict)] if isinstance(value, dict) else []
