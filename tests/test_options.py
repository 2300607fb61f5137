"""The options of a layer: one set of defaults and checks for both layers."""

import inspect
import math
from dataclasses import asdict

import pytest

import diffstride as ds
from diffstride.options import LayerOptions


@pytest.mark.parametrize("layer", [ds.DiffStride2d, ds.DiffStrideConv2d])
def test_signatures_have_the_defaults_of_the_options(layer):
    parameters = inspect.signature(layer).parameters
    assert {name: parameters[name].default for name in asdict(LayerOptions())} == asdict(LayerOptions())


def test_each_option_is_a_read_only_attribute_of_the_layer():
    options = {"smoothness": 2.5, "shared": True, "bounds": (1.5, 3.0), "window": "inner", "basis": "dct",
               "norm": "ortho", "size_multiple": 2, "backend": "fft"}  # fmt: skip
    layer = ds.DiffStride2d(2.0, **options)
    assert {name: getattr(layer, name) for name in options} == options == asdict(layer.options)
    with pytest.raises(AttributeError):
        layer.window = "outer"


def test_the_repr_shows_what_differs_from_the_defaults():
    assert repr(ds.DiffStride2d(2.0)) == "DiffStride2d(stride=(2, 2), smoothness=4.0)"
    text = repr(ds.DiffStrideConv2d(3, 4, 3, 1.5, bounds=(1, 4), basis="dct"))
    assert text.endswith("stride=(1.5, 1.5), smoothness=4.0, bounds=(1.0, 4.0), basis='dct')")


@pytest.mark.parametrize("bounds", [(0.5, None), (3, 2), (math.nan, None), (1, math.nan)])
def test_bounds_that_no_stride_fits_are_refused(bounds):
    with pytest.raises(ValueError, match="bounds must satisfy 1 <= lower <= upper"):
        LayerOptions(bounds=bounds)
