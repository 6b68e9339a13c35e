"""A box of widgets that leaves a still picture for whoever reads the notebook without a kernel."""

from __future__ import annotations

import base64

from ipywidgets import VBox


class StillBox(VBox):
    """A `VBox` whose output holds, beside the live widget, a PNG and a short constant text.

    The PNG shows when a notebook is only opened or exported, the widget once its cell is run. The text is
    constant so that a test may compare it.
    """

    text = "A widget: run the cell to use it."

    def still(self) -> bytes | None:
        """The still picture as the bytes of a PNG file; None where there is nothing to show yet."""
        raise NotImplementedError

    def still_alt(self) -> str:
        """What a person who cannot see the still should know of it."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **kwargs):
        data = super()._repr_mimebundle_(**kwargs)
        data["text/plain"] = self.text
        picture = self.still()
        if picture is None:
            return data, {}
        data["image/png"] = base64.b64encode(picture).decode("ascii")
        return data, {"image/png": {"alt": self.still_alt()}}
