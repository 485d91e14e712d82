"""The student and teacher networks."""

from .resnet import ARCHITECTURES, ResNet, activated, cifar_model_dict, folded
from .stacked import FORMS, Stack
from .zoo import (
    EXPECTED,
    build_network,
    feature_shapes,
    home,
    is_network,
    pretrained,
    register_network,
    set_layout,
    shapes_of,
)
