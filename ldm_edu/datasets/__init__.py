"""Pictures to learn from: procedural captioned scenes, folders, public sets, scikit-image's photographs."""

from ldm_edu.datasets.folder import ImageFolder
from ldm_edu.datasets.images import read_image
from ldm_edu.datasets.public import PublicSet, photographs
from ldm_edu.datasets.reader import Reading, agrees, read_scene, read_scenes
from ldm_edu.datasets.shapes import Scenes, ShapeScenes

__all__ = [
    "ImageFolder",
    "PublicSet",
    "Reading",
    "Scenes",
    "ShapeScenes",
    "agrees",
    "photographs",
    "read_image",
    "read_scene",
    "read_scenes",
]
