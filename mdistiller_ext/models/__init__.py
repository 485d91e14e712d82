"""The student and teacher networks."""

from .resnet import ARCHITECTURES, cifar_model_dict, folded
from .zoo import EXPECTED, build_network, checked, is_network, pretrained, register_network
