"""Base class of everything that is configured."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A typed section of the YAML file. Unknown keys are refused; defaults and assignments are validated too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, validate_default=True)
