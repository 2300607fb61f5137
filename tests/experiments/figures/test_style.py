"""Pictures as files and as parts of a page of HTML."""

import re
from xml.etree import ElementTree

from diffstride.experiments.figures.style import COLOURS, inline_svg, legend, log_scale, panels, save

NAME = "a$b$ <i>&c</i> #000000"


def picture():
    figure, (panel,) = panels(1, title="T")
    panel.plot([0, 1, 2], [1.234567, 2.0, 8.0], color=COLOURS[0], marker="o", label=NAME)
    log_scale(panel, "y", base=2)
    legend(figure, [panel])
    return figure


def test_a_picture_is_written_as_png_and_svg(tmp_path):
    save(picture(), tmp_path / "picture")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "picture.svg").read_text()
    assert len(list(tmp_path.iterdir())) == 2


def test_svg_on_a_page_has_names_as_text_and_the_pages_colours():
    root = ElementTree.fromstring(inline_svg(picture(), NAME, "one"))
    assert (root.tag, root.get("role"), root.find("title").text) == ("svg", "img", NAME)
    assert {"T", NAME, "8"} <= {text.text for text in root.iter("text")}
    styles = " ".join(element.get("style", "") for element in root.iter())
    assert "currentColor" in styles
    assert "#000000" not in styles
    assert not {"metadata", "style", "script"} & {element.tag for element in root.iter()}
    (line,) = (p.get("d") for p in root.iter("path") if "var(--blue)" in p.get("style", "") and p.get("clip-path"))
    assert not re.search(r"\.\d{3}", line)


def test_ids_of_pictures_on_a_page_differ_and_point_to_parts_of_the_same_picture():
    found = []
    for prefix in "one", "two":
        svg = inline_svg(picture(), "title", prefix)
        ids = set(re.findall(r'id="([^"]+)"', svg))
        assert ids == set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg))
        found.append(ids)
    assert found[0]
    assert not found[0] & found[1]
