"""Base class of the schemas of settings."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A section of the YAML file with typed keys.

    Unknown keys are an error. Defaults and later assignments are validated as well.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, validate_default=True)
