"""mvision: one encoder, every task. Detection, instance segmentation and pose on any timm backbone.

Attributes are loaded on first use, so that ``import mvision`` and ``import mvision.neck`` stay cheap.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout the folders heads/, cli/ and configs/ lie beside this package, and ./mvision shadows an installed wheel.
_root = Path(__file__).resolve().parent.parent
if (_root / "heads" / "base.py").is_file() and (_root / "setup.cfg").is_file():
    __path__.append(str(_root))

_LAZY = {
    "create_model": "mvision.weights.push",  # of mvision.model; there they can go to the Hub and come from it
    "load": "mvision.deploy.loading",
    "Model": "mvision.weights.push",
    "Instances": "mvision.structures",
    "Targets": "mvision.structures",
    "Tracker": "mvision.inference.tracking",
    "UserError": "mvision.errors",
}
__all__ = [*_LAZY, "__version__"]

if TYPE_CHECKING:
    from mvision.deploy.loading import load
    from mvision.errors import UserError
    from mvision.inference.tracking import Tracker
    from mvision.model import Model, create_model
    from mvision.structures import Instances, Targets


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mvision' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
