from __future__ import annotations

from understudy.protocol.openai.models import model_list, model_object


def test_a_model_has_openais_fields_and_vllms() -> None:
    model = model_object("m", created=5, root="dir", max_model_len=64)
    assert model_list(model) == {
        "object": "list",
        "data": [
            {
                "id": "m",
                "object": "model",
                "created": 5,
                "owned_by": "understudy",
                "root": "dir",
                "parent": None,
                "max_model_len": 64,
            }
        ],
    }
