"""The picture of the demo: real output, shortened, and nothing from the network."""

import re

from docs.generate.demo_picture import picture


def test_many_lines_of_a_kind_are_shortened_and_nothing_is_loaded():
    said = "cloud: start\n" + "".join(f"round {n}/9: 3 admitted\n" for n in range(1, 10)) + "done\n"
    svg = picture(said)
    text = [line.replace("&#160;", " ") for line in re.findall(r">([^<]+)</text>", svg)]
    assert [line for line in text if "round" in line or "..." in line] == [
        "round 1/9: 3 admitted", "round 2/9: 3 admitted", "  ...", "round 8/9: 3 admitted", "round 9/9: 3 admitted",
    ]  # fmt: skip
    assert "@font-face" not in svg
    assert set(re.findall(r'https?://[^"\s<]+', svg)) <= {"http://www.w3.org/2000/svg", "https://www.textualize.io"}
