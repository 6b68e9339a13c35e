"""What moves in the notebooks: sliders, prompt box, live curve. Only this package imports ipywidgets."""

from ldm_edu.widgets.attention import AttentionExplorer, spotlight
from ldm_edu.widgets.curve import LossCurve
from ldm_edu.widgets.frames import Frame, FrameSlider, TimestepSlider
from ldm_edu.widgets.pictures import latent_channels
from ldm_edu.widgets.prompt import PromptBox
from ldm_edu.widgets.show import Pictures, show, show_figure
from ldm_edu.widgets.system_map import system_map

__all__ = [
    "AttentionExplorer",
    "Frame",
    "FrameSlider",
    "LossCurve",
    "Pictures",
    "PromptBox",
    "TimestepSlider",
    "latent_channels",
    "show",
    "show_figure",
    "spotlight",
    "system_map",
]
