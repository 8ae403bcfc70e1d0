"""The window behind a card's edit button: what the user writes about a file, and what the file says of itself.

The host opens it by three names: the window, a hidden text box for the card's name and a hidden button in it. gradio is
the host's own, of any version since 3.41. Imported only where the host builds its page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from lib_locon.cards import Card, check_place
from lib_locon.errors import FileError
from lib_locon.hosts.metadata_shown import facts_table, preview, sentence, words
from lib_locon.user_metadata import KNOWN_BASES, UNKNOWN, changed, read_user_metadata, save_user_metadata

if TYPE_CHECKING:
    from lib_locon.hosts.cards_page import CardsPage

FIELDS = ("description", "activation text", "negative text", "preferred weight", "sd version", "notes")
"""The keys of the file, in the order of the window's fields."""
_SCRIPT = "_js" if gr.__version__.startswith("3.") else "js"
_BOX = getattr(gr, "Box", None) or gr.Group
Update = Any


class MetadataEditor:
    """One for each tab of the page: `create_ui` where it is to stand, then `setup_ui` with the tab's gallery."""

    def __init__(self, tabname: str, page: CardsPage) -> None:
        self._page = page
        self._tab = tabname
        self.id_part = f"{tabname}_{page.extra_networks_tabname}_edit_user_metadata"

    def create_ui(self) -> None:
        """Makes the window and what its buttons do."""
        with _BOX(visible=False, elem_id=self.id_part, elem_classes=["edit-user-metadata"]) as self._box:
            self._name = gr.Textbox(label="Card", visible=False, elem_id=f"{self.id_part}_name")
            self._open = gr.Button("Edit", visible=False, elem_id=f"{self.id_part}_button")
            self._opened = gr.State(None)
            self._saved = gr.Textbox(label="Saved", visible=False)
            self._create_facts()
            self._create_fields()
            with gr.Row(elem_classes=["edit-user-metadata-buttons"]):
                cancel = gr.Button("Cancel")
                self._replace = gr.Button("Replace preview", variant="primary")
                save = gr.Button("Save", variant="primary")
            self._status = gr.HTML(elem_classes=["edit-user-metadata-status"])
        shown = [self._title, self._facts, self._preview, self._words, *self._fields, self._opened, self._status]
        opening = self._open.click(fn=self.shown, inputs=[self._name], outputs=shown)
        opening.then(fn=lambda: gr.update(visible=True), inputs=[], outputs=[self._box])
        cancel.click(fn=None, **{_SCRIPT: "() => { closePopup(); }"})
        saving = save.click(
            fn=self.save, inputs=[self._name, self._opened, *self._fields], outputs=[self._status, self._saved]
        )
        self._then_refresh(saving, close=True)

    def setup_ui(self, gallery: Any) -> None:
        """What the button for the preview does: it takes the picture that is chosen in the gallery."""
        chosen = f"selected_gallery_index_id('{self._tab}_gallery_container')"
        replacing = self._replace.click(
            fn=self.replace_preview,
            inputs=[self._name, gallery, self._name],
            outputs=[self._preview, self._status, self._saved],
            **{_SCRIPT: f"(name, gallery, index) => [name, gallery, String({chosen})]"},
        )
        self._then_refresh(replacing, close=False)

    def shown(self, name: str) -> list[Update]:
        """What the window shows of a card: its parts, its fields, what the fields were, and no message."""
        card = self._page.card(name)
        if card is None:
            empty: list[Update] = [gr.update(value="") for _ in FIELDS]
            empty[FIELDS.index("preferred weight")] = gr.update(value=0)
            return [sentence(f"{name} is gone"), "", "", "", *empty, None, ""]
        values = read_user_metadata(card.path).written
        fields = [gr.update(value=values[key]) for key in FIELDS]
        known = (UNKNOWN, *KNOWN_BASES)
        version = values["sd version"]  # another program may know more families, and its word stays
        choices = [*known, *([version] if version not in known else [])]
        fields[FIELDS.index("sd version")] = gr.update(value=version, choices=choices)
        own = self._page.metadata_of(card)
        parts = [sentence(name), facts_table(card, own), preview(self._page.preview(card)), words(own)]
        return [*parts, *fields, {"name": name, "values": values}, ""]

    def save(self, name: str, opened: Mapping[str, Any] | None, *fields: Any) -> tuple[str, str]:
        """Writes what was changed in the window. Returns a sentence where that failed, else the card's name."""
        card = self._page.card(name)
        if opened is None or opened["name"] != name or card is None:
            return sentence("Not saved: the window does not show this card yet. Close it and open it again."), ""
        given = dict(zip(FIELDS, fields, strict=True))
        try:
            save_user_metadata(card.path, changed(opened["values"], given), self._folders())
        except (FileError, ValueError) as error:
            return sentence(f"Not saved: {error}"), ""
        return "", name

    def replace_preview(self, name: str, gallery: Sequence[Any] | None, index: str) -> tuple[str, str, str]:
        """Writes a picture of the gallery beside the file; with none chosen, the first one."""
        from modules import images, infotext_utils  # the host's; not in its stand-in

        card = self._page.card(name)
        if card is None or not gallery:
            why = "there is no picture in the gallery" if card else f"{name} is gone"
            return self._preview_of(card), sentence(f"Not replaced: {why}."), ""
        number = int(index) if index.isascii() and index.isdigit() else 0
        try:
            image = infotext_utils.image_from_url_text(gallery[min(number, len(gallery) - 1)])
            text, _ = images.read_info_from_image(image)
            file = self._page.preview_file(card)
            check_place(Path(file), (card.path.parent, *self._folders()))
            images.save_image_with_geninfo(image, text, file)
            self._page.lister.update_file_entry(file)
        except (OSError, ValueError, AssertionError, FileError) as error:
            return self._preview_of(card), sentence(f"Not replaced: {error}"), ""
        return self._preview_of(self._page.card(name)), "", name

    def _create_facts(self) -> None:
        with gr.Row():
            with gr.Column(scale=2):
                self._title = gr.HTML(elem_classes=["extra-network-name"])
                self._facts = gr.HTML()
            with gr.Column(scale=1, min_width=0):
                self._preview = gr.HTML()

    def _create_fields(self) -> None:
        description = gr.Textbox(label="Description", lines=3)
        self._words = gr.HTML(elem_classes=["locon-words"])
        activation = gr.Textbox(
            label="Activation text", info="A click on the card writes it behind the tag", lines=2,
            elem_classes=["locon-activation"],
        )  # fmt: skip
        negative = gr.Textbox(label="Negative text", info="A click writes it into the negative prompt", lines=2)
        with gr.Row():
            weight = gr.Number(label="Preferred weight", info="What a click writes; 0: the webui's default", value=0)
            version = gr.Dropdown(
                label="Made for", info=f"{UNKNOWN}: what the file's tensors say", choices=[UNKNOWN, *KNOWN_BASES],
                value=UNKNOWN, interactive=True,
            )  # fmt: skip
        notes = gr.Textbox(label="Notes", lines=3)
        self._fields = [description, activation, negative, weight, version, notes]

    def _then_refresh(self, event: Any, *, close: bool) -> None:
        script = f"(name) => {{ window.loconSaved?.(name, {str(close).lower()}); }}"
        event.then(fn=None, inputs=[self._saved], outputs=[], **{_SCRIPT: script})

    def _folders(self) -> list[Path]:
        return [Path(folder) for folder in self._page.allowed_directories_for_previews()]

    def _preview_of(self, card: Card | None) -> str:
        return "" if card is None else preview(self._page.preview(card))
