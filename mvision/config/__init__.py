"""The schema of the YAML files, how files and options are combined, and error messages for both."""

from mvision.backbone.config import BackboneConfig as BackboneConfig
from mvision.config.loading import RUN_CONFIG as RUN_CONFIG
from mvision.config.loading import config_of_run as config_of_run
from mvision.config.loading import data_of_run as data_of_run
from mvision.config.loading import load_config as load_config
from mvision.config.loading import merge as merge
from mvision.config.loading import parse_config as parse_config
from mvision.config.loading import parse_model_config as parse_model_config
from mvision.config.loading import shipped_configs as shipped_configs
from mvision.config.schema import AugmentConfig as AugmentConfig
from mvision.config.schema import Config as Config
from mvision.config.schema import DataConfig as DataConfig
from mvision.config.schema import ModelConfig as ModelConfig
from mvision.config.schema import MoreDataConfig as MoreDataConfig
from mvision.config.schema import NeckConfig as NeckConfig
from mvision.config.schema import RunConfig as RunConfig
from mvision.config.training import DecidedTrain as DecidedTrain
from mvision.config.training import TrainConfig as TrainConfig
