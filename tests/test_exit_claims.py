"""Hypotheses on what leaving early by an exit rule is worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_hypotheses import CLAIM, declare, sample, study

from bench.errors import UserError
from bench.study.plan import make_plan
from reports.targets import measures
from reports.verdicts import sentences, verdicts


def test_an_exit_rule_that_a_variant_does_not_have_is_refused_before_anything_runs() -> None:
    rules = {"metric": "exits@zero_attention.max", "than_metric": "exits@oracle"}
    assert make_plan(study({**CLAIM, **rules}), "cmd", None).manifest.hypotheses[0].measures[0].than_metric
    refused = r"hypothesis 'gated better': unknown exit rule of htc: 'zero_attention'"
    with pytest.raises(UserError, match=refused):
        make_plan(study({**CLAIM, "metric": "exits@zero_attention"}), "cmd", None)
    area = {**CLAIM, "metric": "area"}
    for once in (("train.steps=9", "train.eval_every=9"), ("train.steps=1",)):
        with pytest.raises(UserError, match="'gated better': metric 'area' of gated on p_hop, which is validated once"):
            make_plan(study(area, overrides=once), "", None)
    make_plan(study(area, overrides=("train.steps=9", "train.eval_every=8")), "", None)
    with pytest.raises(UserError, match="'area' of gated and htc on p_hop, which are validated at other places"):
        make_plan(study(area, overrides=("train.steps=9", "variants.htc.train.eval_every=3")), "", None)
    with pytest.raises(UserError, match=r"exit rule of gated: 'halting'.*allowed: confidence, "):
        make_plan(study({**CLAIM, "metric": "exits@halting", "than_metric": "exits@random"}), "cmd", None)
    with pytest.raises(UserError, match="exit rule of gated, which has a single exit point: 'random'"):
        make_plan(study({**CLAIM, "metric": "exits@random"}, overrides=("model.n_cycles=1",)), "cmd", None)


def test_exit_rules_are_held_against_each_other() -> None:
    """By the gain over leaving at random, of one variant or of two. What a variant does not have decides nothing."""
    manifest, results = sample(8, 0.1)
    rng = np.random.default_rng(1)

    def moved(id: str, record: Any) -> Any:
        areas = {"confidence": 0.02} | ({"zero_attention": 0.06} if "ztt" in id else {})
        known = record.exits.rules["confidence"]
        rules = {key: known.but(area=area + rng.normal(0, 0.002)) for key, area in areas.items()}
        return record.but(exits=record.exits.but(rules={**rules, "random": known.but(area=0.0)}))

    results = {id: moved(id, record) for id, record in results.items()}
    one = {"better": "ztt", "than": "ztt", "task": "p_hop", "metric": "exits@zero_attention"}
    manifest = declare(manifest, **one, than_metric="exits@random", claim="better than chance", within=0.2)
    manifest = declare(manifest, **one, than_metric="exits@confidence.mean", claim="better than confidence")
    manifest = declare(manifest, task="p_hop", metric="exits@confidence", within=0.02, claim="confidence on both")
    manifest = declare(manifest, **one | {"than": "htc"}, claim="what htc has not")
    rows = verdicts(manifest, results)
    assert [row["verdict"] for row in rows] == ["supported", "supported", "equivalent", "inconclusive"]
    assert [row["pairs"] for row in rows] == ["8/8", "8/8", "8/8", "0/8"]
    assert float(rows[0]["gain"]) == pytest.approx(0.06, abs=0.003)
    assert float(rows[1]["gain"]) == pytest.approx(0.04, abs=0.004)
    assert rows[1]["metric"] == "accuracy gained by exits (zero_attention against confidence)"
    assert sentences(manifest, results)[0].startswith("better than chance: supported: +0.06")
    assert measures(manifest, manifest.tasks[0]) == []  # the table of learning costs has nothing to say of exits
    with pytest.raises(UserError, match=r"both 'ztt'; they must be different"):
        declare(manifest, **one)
    with pytest.raises(UserError, match=r"metric and than_metric are both 'exits@confidence', of the same variant"):
        declare(manifest, **one | {"metric": "exits@confidence"}, than_metric="exits@confidence.mean")
    with pytest.raises(UserError, match=r"than_metric = 'exits@random' and metric must both be exits@RULE"):
        declare(manifest, than_metric="exits@random")
    with pytest.raises(UserError, match=r"unknown exit rule 'confidenc'; did you mean 'confidence'"):
        declare(manifest, metric="exits@confidenc")
