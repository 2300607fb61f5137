"""Freeze learned strides, and write models as ONNX or safetensors files."""

from diffstride.export.freeze import freeze
from diffstride.export.onnx import OnnxFile, onnx_session, to_onnx
from diffstride.export.safetensors import to_safetensors

__all__ = ["OnnxFile", "freeze", "onnx_session", "to_onnx", "to_safetensors"]
