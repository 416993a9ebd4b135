import pytest

from mirror_runtime.errors import InputError
from mirror_runtime.prompts import choose_prompt

PROMPTS = {"query": "find: ", "document": "", "search_query": "own: "}


@pytest.mark.parametrize(
    ("prompts", "template", "chosen", "expected"),
    [
        (PROMPTS, None, {"name": "query"}, "find: "),
        (PROMPTS, None, {"input_type": "search_query"}, "own: "),
        (PROMPTS, None, {"input_type": "passage"}, ""),
        (PROMPTS, "find: {text}", {"input_type": "query"}, ""),
        (PROMPTS, "find: {text}", {"input_type": "classification"}, ""),
        (PROMPTS, "find: {text}", {"input_type": "passage"}, "a prompt of its own"),
        (PROMPTS, "find: {text}", {"name": "document"}, "a prompt of its own"),
        (PROMPTS, "find: {text}", {"name": "search_query"}, "a prompt of its own"),
        ({"": "x"}, None, {}, ""),
        (None, None, {}, ""),
        (None, None, {"name": "query"}, "are unknown here"),
        (None, None, {"input_type": "document"}, "are unknown here"),
    ],
)
def test_the_named_prompt_is_put_before_a_text_or_refused(prompts, template, chosen, expected):
    if " " in expected.strip():
        with pytest.raises(InputError, match=expected):
            choose_prompt(prompts, template, **chosen)
    else:
        assert choose_prompt(prompts, template, **chosen) == expected
