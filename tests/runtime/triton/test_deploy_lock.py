"""The files through which `mirror serve` and `mirror deploy` find each other, and the options of a present version."""

import json
from concurrent.futures import ThreadPoolExecutor, TimeoutError

import pytest

from mirror_runtime.errors import BundleError, InputError, ServerError
from mirror_runtime.tokenizer import LongTexts
from mirror_runtime.triton.repository.options import ServingOptions
from mirror_runtime.triton.repository.render import write_temporary_repository
from mirror_runtime.triton.server.control import Access
from mirror_runtime.triton.server.deploy import deploy, present_options
from mirror_runtime.triton.server.deploy_lock import ACCESS_FILE, ServerFile, deploying, find_server
from mirror_runtime.triton.server.supervisor import serve

ACCESS = Access(address="127.0.0.1:1", key="secret", pid=2)


def test_a_server_is_found_while_its_process_lives(tmp_path):
    assert find_server(tmp_path) is None
    with ServerFile(tmp_path) as server_file:
        with pytest.raises(ServerError, match="is starting"):
            find_server(tmp_path)
        server_file.write(ACCESS)
        assert find_server(tmp_path) == ACCESS
        server_file.write(Access(address="127.0.0.1:1", key="k", pid=3))
        assert find_server(tmp_path) == Access(address="127.0.0.1:1", key="k", pid=3)
        assert (tmp_path / ACCESS_FILE).stat().st_mode & 0o777 == 0o600
    assert find_server(tmp_path) is None
    (tmp_path / ACCESS_FILE).write_text(json.dumps({"address": "127.0.0.1:1", "key": "of a killed one", "pid": 1}))
    assert find_server(tmp_path) is None
    with ServerFile(tmp_path) as server_file:
        server_file.write(ACCESS)
        assert find_server(tmp_path) == ACCESS


def test_a_server_that_waited_for_the_lock_of_one_that_ended_is_found(tmp_path):
    first = ServerFile(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ServerFile, tmp_path)
        with pytest.raises(TimeoutError):
            waiting.result(0.1)
        first.__exit__()
        with waiting.result(5) as second:
            second.write(ACCESS)
            assert find_server(tmp_path) == ACCESS


def test_a_second_server_or_deployment_and_a_file_as_a_repository_are_rejected(tmp_path):
    with ServerFile(tmp_path), pytest.raises(InputError, match="another mirror serve runs on"):
        ServerFile(tmp_path)
    with deploying(tmp_path), pytest.raises(InputError, match="another process deploys into"), deploying(tmp_path):
        pass
    with deploying(tmp_path):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"), deploying(tmp_path / "file"):
        pass


def test_the_present_options_are_read_back(make_bundle, tmp_path):
    options = ServingOptions(engine="fake", streams=3, long_texts=LongTexts.CHUNK, max_batch_size=12)
    assert present_options(tmp_path / "embed") == ServingOptions()
    write_temporary_repository(make_bundle(), tmp_path, options)
    assert present_options(tmp_path / "embed") == options


@pytest.mark.parametrize("config", ['name: "embed" backend: "python"', "no protobuf at all", "max_batch_size: -"])
def test_a_model_of_another_project_is_not_replaced(tmp_path, config):
    (tmp_path / "config.pbtxt").write_text(config)
    with pytest.raises(InputError, match="this project did not write"):
        present_options(tmp_path)


def test_an_unprovable_bundle_changes_nothing_and_options_are_for_bundles_only(make_bundle, tmp_path):
    repository, bundle = tmp_path / "models", make_bundle()
    with pytest.raises(BundleError):  # its fingerprint is made up
        deploy(bundle, repository)
    with pytest.raises(BundleError, match="no-such"):
        deploy(tmp_path / "no-such", repository)
    assert not repository.exists()
    repository.mkdir()
    write_temporary_repository(bundle, repository, ServingOptions(engine="fake"))
    with pytest.raises(InputError, match="with its own options in"):
        serve(repository, options=ServingOptions(engine="fake"))
    with pytest.raises(BundleError):
        serve(tmp_path / "nothing")
