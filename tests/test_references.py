"""References: frozen, JSON, without secrets."""

import copy
import pickle

import pytest

from kailash_nb.exceptions import ResourceConfigError
from kailash_nb.references import ResourceReference, canonical


def reference(**config) -> ResourceReference:
    return ResourceReference("database", {"host": "localhost", "database": "shop", **config}, "db_creds")


def test_a_reference_is_a_value():
    assert reference() == reference()
    assert hash(reference()) == hash(reference())
    assert reference(port=1) != reference()
    assert pickle.loads(pickle.dumps(reference())) == copy.deepcopy(reference()) == reference()
    assert ResourceReference.from_dict(reference().to_dict()) == reference()


def test_a_reference_does_not_change_with_the_mapping_it_was_made_of():
    config = {"host": "a", "options": [1]}
    made = ResourceReference("x", config)
    config["host"] = "b"
    config["options"].append(2)
    assert made.config == {"host": "a", "options": [1]}
    with pytest.raises(TypeError):
        made.config["host"] = "c"


@pytest.mark.parametrize("key", ["password", "PASSWORD", "token", "api_key", "dsn"])
def test_a_secret_in_the_config_is_refused_with_the_remedy_and_not_shown(key):
    with pytest.raises(ResourceConfigError, match="credentials_ref='NAME'") as caught:
        reference(**{key: "hunter22"})
    assert "hunter22" not in str(caught.value)


def test_a_secret_header_is_refused():
    with pytest.raises(ResourceConfigError, match=r"headers\.Authorization"):
        ResourceReference("http_client", {"headers": {"Authorization": "Bearer x"}})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResourceReference("", {}), "the type is a name"),
        (lambda: ResourceReference("database", []), "config is a mapping"),
        (lambda: ResourceReference("database", {"x": object()}), "JSON values only"),
        (lambda: ResourceReference("database", {"x": float("nan")}), "JSON values only"),
        (lambda: ResourceReference("database", {}, {"user": "u"}), "name of a stored secret"),
        (lambda: ResourceReference.from_dict({"typ": "database"}), "did you mean 'type'"),
        (lambda: ResourceReference.from_dict({"config": {}}), "'type' is missing"),
        (lambda: ResourceReference.from_dict(["database"]), "an object or '@name'"),
    ],
)
def test_what_is_no_reference_is_refused(make, message):
    with pytest.raises(ResourceConfigError, match=message):
        make()


def test_the_canonical_identity_tells_every_field_apart():
    base = canonical("database", {"host": "a", "port": 1}, "s")
    assert base == canonical("database", {"port": 1, "host": "a"}, "s")
    others = [
        canonical("cache", {"host": "a", "port": 1}, "s"),
        canonical("database", {"host": "b", "port": 1}, "s"),
        canonical("database", {"host": "a", "port": "1"}, "s"),
        canonical("database", {"host": "a", "port": 1}, "t"),
        canonical("database", {"host": "a", "port": 1}, None),
    ]
    assert len({base, *others}) == 6
