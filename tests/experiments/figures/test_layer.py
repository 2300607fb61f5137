"""Pictures of a layer show the images and spectra that they are given."""

import torch

from diffstride.experiments.figures import layer


def test_layer_steps(inside):
    image, output = torch.rand(3, 8, 6), torch.rand(3, 4, 5)
    spectrum, window, kept = torch.rand(8, 6) + 0.1, torch.rand(8, 6), torch.rand(4, 5) + 0.1
    figure = layer.layer_steps(image, spectrum, window, kept, output, title="T")
    panels = figure.axes[:6]
    drawn = [torch.as_tensor(panel.images[0].get_array()) for panel in panels]
    expected = [image.movedim(0, -1), spectrum, window, spectrum * window, kept, output.movedim(0, -1)]
    for values, given in zip(drawn, expected, strict=True):
        assert torch.equal(values, given)
    # Row 4 and column 3 are frequency 0; of 5 columns that is the one in the middle, of 4 rows the third.
    assert panels[1].images[0].get_extent() == [-3.5, 2.5, 3.5, -4.5]
    assert panels[4].images[0].get_extent() == [-2.5, 2.5, 1.5, -2.5]
    (box,) = panels[3].patches
    assert box.get_bbox().extents.tolist() == [-2.5, -2.5, 2.5, 1.5]
    assert panels[4].get_xlim() == panels[1].get_xlim()
    assert inside(figure)


def test_before_and_after():
    first, second = layer.before_and_after({"in": torch.eye(4), "out": torch.eye(2)}).axes
    assert first.get_title() == "in\n4 x 4"
    assert second.get_images()[0].get_array().tolist() == [[1, 0], [0, 1]]
