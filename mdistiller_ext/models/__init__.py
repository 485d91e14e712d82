"""The student and teacher networks."""

from .resnet import ARCHITECTURES, cifar_model_dict, folded
