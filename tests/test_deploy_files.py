"""The files in `deploy/` are what the tools they are for take."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCHEMA = json.loads((Path(__file__).parent / "data" / "kserve_inferenceservice.json").read_text())


def test_kserve_takes_its_manifest() -> None:
    manifest = yaml.safe_load((ROOT / "deploy" / "kserve.yaml").read_text())
    jsonschema.validate(manifest, SCHEMA)
    assert 0 < manifest["spec"]["predictor"]["canaryTrafficPercent"] < 100


@pytest.mark.parametrize(("field", "value"), [("canaryTrafficPercent", "10 %"), ("canaryPercent", 10)])
def test_it_would_not_take_another(field: str, value: object) -> None:
    manifest = yaml.safe_load((ROOT / "deploy" / "kserve.yaml").read_text())
    manifest["spec"]["predictor"][field] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, SCHEMA)
