"""The schema of the YAML files, how files and options are combined, and error messages for both."""

from mvision.backbone.config import BackboneConfig
from mvision.config.loading import (
    RUN_CONFIG,
    config_of_run,
    load_config,
    merge,
    parse_config,
    parse_model_config,
    shipped_configs,
)
from mvision.config.schema import (
    AugmentConfig,
    Config,
    DataConfig,
    ModelConfig,
    MoreDataConfig,
    NeckConfig,
    TrainConfig,
)

__all__ = [
    "RUN_CONFIG",
    "AugmentConfig",
    "BackboneConfig",
    "Config",
    "DataConfig",
    "ModelConfig",
    "MoreDataConfig",
    "NeckConfig",
    "TrainConfig",
    "config_of_run",
    "load_config",
    "merge",
    "parse_config",
    "parse_model_config",
    "shipped_configs",
]
