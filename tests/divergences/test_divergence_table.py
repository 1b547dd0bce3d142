"""The README's table of divergences is the definitions' own."""

from pathlib import Path

from kd_plugin.divergences.registry import DIVERGENCES, formula_table, get
from kd_plugin.settings.distill import BUILT_IN

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_shows_the_definitions_as_they_are():
    text = README.read_text()
    block = text.split("<!-- divergences -->\n")[1].split("\n<!-- /divergences -->")[0]
    assert block == formula_table()


def test_the_configuration_knows_every_definition_and_no_other():
    assert set(BUILT_IN) <= set(DIVERGENCES)
    assert all(name in formula_table() for name in BUILT_IN)


def test_the_configuration_says_of_each_what_its_definition_says():
    assert {name: about.sorts for name, about in BUILT_IN.items()} == {name: get(name).sorts for name in BUILT_IN}
