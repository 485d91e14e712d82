"""The student and teacher networks."""

from .resnet import cifar_model_dict, folded
