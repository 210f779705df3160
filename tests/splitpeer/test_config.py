"""peer.toml and job.toml: what is valid, which source wins; every mistake is one line with file, key and fix."""

from __future__ import annotations

import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest

from splitpeer.errors import ConfigError
from splitpeer.settings import templates
from splitpeer.settings.job import JobConfig
from splitpeer.settings.loading import parse_override, to_toml
from splitpeer.settings.peer import PeerConfig, find_peer_toml
from splitproto import Timing, pki
from splitproto.errors import NotAuthorised
from splitproto.lanes.addresses import served_address

NOW = datetime.now(UTC)
CLIENT = templates.peer_toml(role="client", site="north", federation="demo", modality="t1")
COORDINATOR = templates.peer_toml(role="coordinator", site="hub", federation="demo", convention="brats")
JOB = templates.job_toml("glioma", {"north": ["t1"], "south": ["flair"]})


def write(folder: Path, text: str, name: str = "peer.toml") -> Path:
    (folder / name).write_text(text, "utf-8")
    return folder / name


def peer(folder: Path, text: str = CLIENT, **environ: str) -> PeerConfig:
    return PeerConfig.load(write(folder, text), environ=environ)


def job(folder: Path, text: str = JOB) -> JobConfig:
    return JobConfig.load(write(folder, text, "job.toml"))


def changed(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{old!r} must be in the template once"
    return text.replace(old, new)


# ---- what holds


def test_a_client(tmp_path: Path) -> None:
    config = peer(tmp_path)
    assert (config.peer.role, config.peer.site, config.peer.held) == ("client", "north", "t1")
    assert config.peer.state == tmp_path / "state"
    assert config.tls.key == tmp_path / "pki" / "north.key"
    assert config.tls.crl is None
    assert config.policy is not None
    assert config.policy.coordinators == ("hub",)
    assert config.policy.levels == (0, 1, 2, 3, 4)
    assert config.policy.precision == ("f32", "bf16", "f16", "int8", "int4")
    assert config.policy.max_message_bytes == 2**30
    assert config.runtime.initial_weights == "private"
    assert config.network.reconnect_s == 300
    assert config.network.timing() == Timing()


def test_how_long_a_link_serves(tmp_path: Path) -> None:
    text = changed(CLIENT, "rotate_mib = 262144", "rotate_mib = 1")
    text = changed(text, "rotate_s = 86400", "rotate_s = 3")
    timing = peer(tmp_path, changed(text, "recheck_s = 30", "recheck_s = 0.5")).network.timing()
    assert timing == Timing(byte_budget=1 << 20, lifetime=3.0, recheck=0.5)


def test_a_coordinator(tmp_path: Path) -> None:
    config = peer(tmp_path, COORDINATOR)
    assert config.network.listen == "tcp://127.0.0.1:7443"
    assert config.data.labels == tmp_path / "labels"
    assert config.data.convention == "brats"
    assert config.policy is None
    with pytest.raises(ConfigError, match="has no \\[policy\\]"):
        config.allow_list()


def test_what_is_left_out_has_the_same_default_as_the_template(tmp_path: Path) -> None:
    bare = """
        [peer]\nrole = "client"\nsite = "north"\nfederation = "demo"\nmodality = "t1"
        [tls]\nca = "pki/ca.crt"\ncertificate = "pki/north.crt"\nkey = "pki/north.key"
        [network]\ncoordinator = "tcp://coordinator.example.org:7443"
        [data]\nimages = "images"\nsalt = "pki/federation.salt"
        [policy]\ncoordinators = ["hub"]
    """
    assert peer(tmp_path, bare).resolved() == peer(tmp_path).resolved()
    assert (
        job(tmp_path, '[job]\nname = "glioma"\n[sites]\nnorth = "t1"\nsouth = "flair"').resolved()
        == job(tmp_path).resolved()
    )


def test_a_client_that_holds_several_modalities(tmp_path: Path) -> None:
    text = changed(CLIENT, 'modality = "t1"', 'modality = ["T2", "flair"]')
    config = peer(tmp_path, text)
    assert (config.peer.modalities, config.peer.held) == (("t2", "flair"), "t2, flair")
    assert config.resolved()["peer"]["modality"] == ["t2", "flair"]
    assert peer(tmp_path).resolved()["peer"]["modality"] == "t1"
    assert peer(tmp_path, SPLITPEER_PEER__MODALITY='["adc", "t2"]').peer.modalities == ("adc", "t2")
    assert peer(tmp_path, COORDINATOR).peer.modalities == ()
    with pytest.raises(ConfigError, match=r"\[peer\] modality: the same twice"):
        peer(tmp_path, changed(CLIENT, 'modality = "t1"', 'modality = ["t1", "T1w"]'))


def test_first_weights_of_an_encoder(tmp_path: Path) -> None:
    config = peer(tmp_path, CLIENT + '\n[model]\nweights = "t1.safetensors"\n')
    assert config.model is not None
    assert config.model.network is None  # the job's
    assert config.model.weights_of("t1") == tmp_path / "t1.safetensors"
    assert config.resolved()["model"] == {"weights": str(tmp_path / "t1.safetensors")}
    config = peer(
        tmp_path, CLIENT + '\n[model]\nweights = { T1w = "a.safetensors", mri = "b.safetensors" }\n'
    )
    assert config.model is not None
    assert config.model.weights == {"t1": tmp_path / "a.safetensors", "mri": tmp_path / "b.safetensors"}
    assert config.model.weights_of("t2") is None
    own = peer(tmp_path, CLIENT + "\n[model]\nfeatures = [4, 4, 4, 8, 8, 4]\n").model
    assert own is not None
    assert own.network == "basic-unet"
    for wrong, said in (
        ("3", "3 is neither a file nor a table"),
        ('""', "is empty"),
        ("{ t1 = 3 }", "neither a file nor a table"),
    ):
        with pytest.raises(ConfigError, match=rf"\[model\] weights.*{said}"):
            peer(tmp_path, CLIENT + f"\n[model]\nweights = {wrong}\n")


def test_a_recipe_for_first_weights(tmp_path: Path) -> None:
    assert job(tmp_path).pretraining is None
    recipe = job(tmp_path, JOB + '\n[pretraining]\ndata = "phantom"\n').pretraining
    assert recipe is not None
    assert (recipe.labels, recipe.steps, recipe.seed, recipe.own_steps) == ("regions", 1000, None, 0)
    for wrong, said in (
        ("steps = 10", r"\[pretraining\] data is missing"),
        ('data = "phantom"\nlabels = "some"', r"\[pretraining\] labels must be 'regions' or 'none'"),
        ('data = "phantom"\nsteps = 0', r"\[pretraining\] steps must be greater than 0"),
        ('data = "../x"', r"\[pretraining\] data"),
    ):
        with pytest.raises(ConfigError, match=said):
            job(tmp_path, JOB + f"\n[pretraining]\n{wrong}\n")


def test_an_encoder_of_ones_own(tmp_path: Path) -> None:
    own = '\n[model]\nnetwork = "residual-unet"\nfeatures = [4, 8]\n'
    config = peer(tmp_path, CLIENT + own)
    assert config.model is not None
    assert (config.model.network, config.model.given) == ("residual-unet", {"features": (4, 8)})
    assert peer(tmp_path).model is None
    for spoilt, words in (
        (
            own.replace("residual-unet", "u-net"),
            "network 'u-net' is unknown; known are basic-unet, residual-unet",
        ),
        (own + "depths = [2, 2, 2, 2]\n", "residual-unet has no setting 'depths'; it has features, strides"),
        (own + "levels = [0]\n", "levels is unknown"),
    ):
        with pytest.raises(ConfigError, match=f"\\[model\\].*{words}"):
            peer(tmp_path, CLIENT + spoilt)
    with pytest.raises(ConfigError, match=r"\[model\] is not for a coordinator's peer\.toml"):
        peer(tmp_path, COORDINATOR + own)


def test_what_the_templates_propose_loads(tmp_path: Path) -> None:
    """Lines about DICOM and inference are comments, for whoever takes them away."""
    text = changed(CLIENT, '# inference = "own"', 'inference = "listed"')
    text = changed(text, "# inference_for", "inference_for")
    assert peer(tmp_path, text).policy.inference_for == ("south",)
    for key in ("[prepare]", "skull_strip", "deadline_s", "ids"):
        text = changed(text, f"\n# {key}", f"\n{key}")
    said = peer(tmp_path, text).prepare
    assert (said.skull_strip or "").startswith("/opt/hd-bet/bin/hd-bet -i {in} -o {out} ")
    assert (said.deadline_s, said.ids) == (3600, tmp_path / "ids.csv")
    text = changed(changed(JOB, "# [inference]", "[inference]"), '# serve = "after"', 'serve = "after"')
    assert job(tmp_path, text).inference.serve == "after"


def test_a_list_of_withdrawn_patients_is_a_clients(tmp_path: Path) -> None:
    text = changed(CLIENT, '# withdrawn = "withdrawn.txt"', 'withdrawn = "withdrawn.txt"')
    assert peer(tmp_path, text).data.withdrawn == tmp_path / "withdrawn.txt"
    text = changed(COORDINATOR, "[data]\n", '[data]\nwithdrawn = "withdrawn.txt"\n')
    with pytest.raises(ConfigError, match=r"\[data\] withdrawn is not for a coordinator: remove it"):
        peer(tmp_path, text)


def test_an_encoder_is_not_shared_with_a_privacy_budget(tmp_path: Path) -> None:
    """SP-11.16-8."""
    assert peer(tmp_path).policy.share_encoder is False
    shared = changed(CLIENT, "share_encoder = false", "share_encoder = true")
    assert peer(tmp_path, shared).policy.share_encoder is True
    budget = 'defences = ["dp-gaussian:clip=1,noise=1"]\nepsilon = 8.0\ndelta = 1e-5\nmay_record'
    with pytest.raises(ConfigError, match=r"epsilon promises nothing about a shared encoder"):
        peer(tmp_path, changed(shared, "may_record", budget))


def test_the_loss_is_no_way_round_noise_on_its_gradient(tmp_path: Path) -> None:
    """SP-11.20-10."""
    noise, figures = 'label_defences = ["gaussian:5"]\n', 'figures = ["dice", "loss"]\n'
    for allowed in (noise, figures, noise + 'figures = ["dice"]\n'):
        peer(tmp_path, changed(CLIENT, "may_record", f"{allowed}may_record"))
    with pytest.raises(ConfigError, match='figures with "loss" tell the masks that label_defences hide'):
        peer(tmp_path, changed(CLIENT, "may_record", f"{noise}{figures}may_record"))


def test_a_job(tmp_path: Path) -> None:
    config = job(tmp_path)
    assert config.sites == {"north": ("t1",), "south": ("flair",)}
    assert config.data.window == (96, 96)
    assert config.output.folder == tmp_path / "runs" / "glioma"
    assert config.training.precision == "f32"
    volumes = changed(JOB, "dimensions = 2", "dimensions = 3")
    assert job(tmp_path, changed(volumes, "window = [96, 96]", "")).data.window == (128, 128, 128)
    assert isinstance(job(tmp_path, changed(JOB, "validation = 0.2", "validation = 3")).data.validation, int)


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("T1", "t1"),
        ("T1Gd", "t1ce"),
        ("t2f", "flair"),
        ("T2w", "t2"),
        ("FLAIR", "flair"),
        ("ADC", "adc"),
        ("CT", "ct"),
    ],
)
def test_modalities_have_one_spelling(tmp_path: Path, given: str, canonical: str) -> None:
    assert peer(tmp_path, changed(CLIENT, '"t1"', f'"{given}"')).peer.modalities == (canonical,)
    assert job(tmp_path, f'[job]\nname = "j"\n[sites]\na = "{given}"').sites == {"a": (canonical,)}


def test_the_seed_of_demonstrations_is_explicit(tmp_path: Path) -> None:
    assert peer(tmp_path, changed(CLIENT, '"private"\n', "7\n")).runtime.initial_weights == 7
    assert peer(tmp_path, SPLITPEER_RUNTIME__INITIAL_WEIGHTS="7").runtime.initial_weights == 7


def test_settings_do_not_change(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        peer(tmp_path).peer.site = "south"  # type: ignore[misc]


def test_what_is_resolved_loads_again_to_the_same(tmp_path: Path) -> None:
    odd = changed(CLIENT, '"images"', '"im\\u00e4ges \\"x\\" \\\\ \\u007f"')
    config = peer(tmp_path, odd)
    assert config.data.images == tmp_path / 'imäges "x" \\ \x7f'
    assert peer(tmp_path, to_toml(config.resolved())).resolved() == config.resolved()
    first = job(tmp_path, '[job]\nname = "j"\n[sites]\n"a.b" = "t1"\n[training]\nlearning_rate = 1e-05')
    again = job(tmp_path, to_toml(first.resolved()))
    assert again.resolved() == first.resolved()
    assert tomllib.loads(to_toml(first.resolved())) == first.resolved()


# ---- who wins


def test_flag_over_environment_over_file_over_default(tmp_path: Path) -> None:
    path = write(tmp_path, changed(CLIENT, "threads = 1", "threads = 2"))
    assert PeerConfig.load(path, environ={}).runtime.threads == 2
    environ = {
        "SPLITPEER_RUNTIME__THREADS": "3",
        "SPLITPEER_POLICY__LEVELS": "[3, 4]",
        "SPLITPEER_CONFIG": "x",
    }
    assert PeerConfig.load(path, environ=environ).runtime.threads == 3
    assert PeerConfig.load(path, {"runtime.threads": 4}, environ).runtime.threads == 4
    assert PeerConfig.load(path, {"runtime.threads": None}, environ).runtime.threads == 3
    policy = PeerConfig.load(path, environ=environ).policy
    assert policy is not None
    assert policy.levels == (3, 4)


def test_paths_count_from_where_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "work").mkdir()
    path = write(tmp_path / "etc", CLIENT)
    monkeypatch.chdir(tmp_path / "work")
    config = PeerConfig.load(
        path, {"data.salt": "s"}, {"SPLITPEER_TLS__CA": "ca", "SPLITPEER_PEER__STATE": "/var/x"}
    )
    assert config.tls.key == tmp_path / "etc" / "pki" / "north.key"
    assert config.tls.ca == tmp_path / "work" / "ca"
    assert config.data.salt == tmp_path / "work" / "s"
    assert config.peer.state == Path("/var/x")
    assert (
        PeerConfig.load(Path("../etc/peer.toml"), environ={}).data.images == tmp_path / "work/../etc/images"
    )


def test_where_peer_toml_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    environ = {"HOME": str(tmp_path / "home")}
    with pytest.raises(
        ConfigError, match=r"no peer\.toml \(looked for peer\.toml and .*home/\.config/splitpeer"
    ):
        find_peer_toml(None, environ)
    for folder in ("home/.config/splitpeer", "xdg/splitpeer"):
        (tmp_path / folder).mkdir(parents=True)
        write(tmp_path / folder, CLIENT)
    assert find_peer_toml(None, environ) == tmp_path / "home/.config/splitpeer/peer.toml"
    environ["XDG_CONFIG_HOME"] = str(tmp_path / "xdg")
    assert find_peer_toml(None, environ) == tmp_path / "xdg/splitpeer/peer.toml"
    write(tmp_path, CLIENT)
    assert find_peer_toml(None, environ) == Path("peer.toml")
    environ["SPLITPEER_CONFIG"] = "named.toml"
    assert find_peer_toml(None, environ) == Path("named.toml")
    assert find_peer_toml(Path("flag.toml"), environ) == Path("flag.toml")


# ---- mistakes


def refused(load: object, *arguments: object, **keywords: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*arguments, **keywords)  # type: ignore[operator]
    text = str(caught.value)
    assert "\n" not in text
    assert "pydantic" not in text
    assert caught.value.exit_code == 4
    return text


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('site = "north"', 'sitte = "north"', "[peer] sitte is unknown: did you mean site?"),
        ('site = "north"', "", "[peer] site is missing: add it"),
        ('site = "north"', 'site = "North"', "[peer] site: name 'North' is not a name: 1 to 63"),
        ('site = "north"', "site = 3", "[peer] site must be a valid string, not 3"),
        ('role = "client"', 'role = "server"', "[peer] role must be 'client' or 'coordinator', not 'server'"),
        (
            'modality = "t1"',
            'modality = "mask"',
            "[peer] modality: 'mask' is what masks are called: give the modality",
        ),
        ('modality = "t1"', "", 'a client needs [peer] modality: add modality = "t1"'),
        ("[tls]", "[tlss]", "[tlss] is unknown: did you mean tls?"),
        ("[tls]", "[tlss]", "[tls] is missing: add the section"),
        ("[runtime]", "runtime = 3\n[log]\n[runtimes]", "not valid TOML"),
        (
            '"tcp://coordinator.example.org:7443"',
            '"https://hub"',
            "'https://hub' is not an address: write tcp://",
        ),
        ('"tcp://coordinator.example.org:7443"', '"tcp://hub:70000"', "is not an address"),
        ('"tcp://coordinator.example.org:7443"', '"tcp://*:7443"', "nobody can dial '*'"),
        ("reconnect_s = 300", "reconnect_s = 0", "[network] reconnect_s must be greater than 0, not 0"),
        ("reconnect_s = 300", "reconnect_s = nan", "[network] reconnect_s must be"),
        (
            "rotate_mib = 262144",
            "rotate_mib = 262145",
            "[network] rotate_mib must be less than or equal to 262144",
        ),
        ("rotate_mib = 262144", "rotate_mib = 0", "[network] rotate_mib must be greater than or equal to 1"),
        ("rotate_s = 86400", "rotate_s = 0", "[network] rotate_s must be greater than 0"),
        ("recheck_s = 30", "recheck_s = inf", "[network] recheck_s must be"),
        ("reconnect_s = 300", 'listen = "tcp://*:1"', "[network] listen is not for a client: remove it"),
        ('images = "images"', 'images = ""', "[data] images: is empty"),
        ('images = "images"', "images = 3", "[data] images"),
        ('images = "images"', 'labels = "l"', "[peer] modality is not for a client without [data] images"),
        ('salt = "pki/federation.salt"', "", "[data] salt is missing"),
        ('["hub"]', "[]", "[policy] coordinators"),
        ('["hub"]', '"hub"', "[policy] coordinators must be a valid list, not 'hub'"),
        ('["hub"]', '["*"]', "[policy] coordinators, item 1: name '*' is not a name"),
        ('["hub"]', '["hub", "hub"]', "name each once"),
        ("levels = [0, 1, 2, 3, 4]", "levels = [1, 1]", "[policy] levels: must be distinct"),
        (
            "levels = [0, 1, 2, 3, 4]",
            "levels = [4, 16]",
            "[policy] levels, item 2 must be less than 16",
        ),
        (
            '["f32", "bf16", "f16", "int8", "int4"]',
            '["f64"]',
            "[policy] precision, item 1 must be 'f32', 'bf16', 'f16', 'int8' or 'int4', not 'f64'",
        ),
        ("threads = 1", "threads = 0", "[runtime] threads must be greater than 0, not 0"),
        ("threads = 1", "threads = 1.5", "[runtime] threads must be a valid integer"),
        ('device = "cpu"', 'device = "tpu"', "[runtime] device"),
        ('"private"\n', '"random"\n', "'random' is neither \"private\" nor a seed"),
        ('"private"\n', "-1\n", "-1 is neither"),
        ('"private"\n', "true\n", "True is neither"),
        (
            'level = "info"',
            'level = "loud"',
            "[log] level must be 'debug', 'info', 'warning' or 'error', not 'loud'",
        ),
        ('level = "info"', "level = info", "not valid TOML"),
    ],
)
def test_mistakes_in_peer_toml(tmp_path: Path, old: str, new: str, expected: str) -> None:
    text = refused(peer, tmp_path, changed(CLIENT, old, new))
    assert text.startswith(f"{tmp_path / 'peer.toml'}: ")
    assert expected in text


def test_mistakes_of_a_coordinator(tmp_path: Path) -> None:
    text = refused(peer, tmp_path, COORDINATOR + '[policy]\ncoordinators = ["hub"]\n')
    assert "[policy] is not for a coordinator" in text
    assert "[data] convention is missing" in refused(
        peer, tmp_path, changed(COORDINATOR, 'convention = "brats"', "")
    )
    both = changed(
        changed(COORDINATOR, 'labels = "labels"', 'images = "i"'), 'listen = "tcp://127.0.0.1:7443"', ""
    )
    text = refused(peer, tmp_path, both)
    assert "[network] listen: add" in text
    assert "[data] images is not for" in text
    assert text.count("peer.toml: ") == 1, "all problems in one line, the file named once"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('south = "flair"', 'South = "flair"', "[sites] South: name 'South' is not a name"),
        ('south = "flair"', 'south = "p t"', "[sites] south: 'p t' is not a valid name of a modality"),
        (
            "window = [96, 96]",
            "window = [96, 90]",
            "[data] window [96, 90] must have 2 sizes, each divisible by 16",
        ),
        ("window = [96, 96]", "window = [96, 96, 96]", "has 3 sizes but [model] dimensions is 2"),
        ("window = [96, 96]", "window = [16, 16]", "use 32 or more"),
        ("window = [96, 96]", "window = [0, 16]", "[data] window, item 1"),
        ("dimensions = 2", "dimensions = 4", "[model] dimensions must be 2 or 3, not 4"),
        ("features = [32, 32, 64, 128, 256, 32]", "features = [32]", "[model]: features must be six"),
        ("[32, 32, 64, 128, 256, 32]", "[32, 32, 63, 128, 256, 32]", "must be even"),
        ("levels = [0, 1, 2, 3, 4]", "levels = [4, 4]", "[model] levels: must be distinct"),
        ("levels = [0, 1, 2, 3, 4]", "levels = [0, 1]", "level 4, the bottleneck, must leave the site"),
        ("levels = [0, 1, 2, 3, 4]", "levels = [4, 7]", "levels must be distinct and of 0 to 4, not [4, 7]"),
        ('"concat"', '"max"', "[model] fusion must be 'concat', 'mean' or 'secure-sum', not 'max'"),
        ("validation = 0.2", "validation = 1.0", "leaves no patient to train on"),
        ("validation = 0.2", 'validation = "x"', "neither a number of patients"),
        ("steps = 1000", "steps = 0", "[training] steps must be greater than 0"),
        ("steps = 1000", "steps = 100000000", "[training] steps must be less than or equal to 99999999"),
        ("learning_rate = 0.005", "learning_rate = inf", "[training] learning_rate must be a finite number"),
        ('"adam"', '"lion"', "[training] optimiser must be 'adam', 'adamw' or 'sgd', not 'lion'"),
        ("overlap = 0.5", "overlap = 1", "[evaluation] overlap must be less than 1"),
        ("step_s = 120", "step_s = -1", "[deadlines] step_s must be greater than 0"),
        ("seed = 0", f"seed = {2**63}", "[job] seed"),
        ('name = "glioma"', 'name = "a/b"', "[job] name"),
        ('name = "glioma"', "", "[job] name is missing"),
        ("[deadlines]", "[deadline]", "[deadline] is unknown: did you mean deadlines?"),
    ],
)
def test_mistakes_in_job_toml(tmp_path: Path, old: str, new: str, expected: str) -> None:
    text = refused(job, tmp_path, changed(JOB, old, new))
    assert text.startswith(f"{tmp_path / 'job.toml'}: ")
    assert expected in text


def test_files_that_are_no_toml(tmp_path: Path) -> None:
    assert "no such file: make one with splitpeer init" in refused(PeerConfig.load, tmp_path / "none.toml")
    assert "Is a directory" in refused(PeerConfig.load, tmp_path)
    (tmp_path / "latin").write_bytes(b'x = "\xe4"')
    assert "not UTF-8" in refused(PeerConfig.load, tmp_path / "latin")
    assert "at line 1" in refused(PeerConfig.load, write(tmp_path, "x = ]"))
    assert "[job] is missing" in refused(job, tmp_path, "")
    assert "[tls] is a section: write [tls]" in refused(peer, tmp_path, "tls = 3\npeer = 4\n")
    assert "[model] is a section" in refused(
        job, tmp_path, "model = 3\ndata = 3\njob = 3\noutput = 2\nsites = 1"
    )


def test_the_environment_is_named_when_it_is_wrong(tmp_path: Path) -> None:
    for environ, expected in [
        ({"SPLITPEER_RUNTIME__THREADS": "many"}, "[runtime] threads must be a valid integer, not 'many'"),
        ({"SPLITPEER_RUNTIME__THREDS": "1"}, "[runtime] threds is unknown: did you mean threads?"),
        ({"SPLITPEER_RUNTIM__THREADS": "1"}, "[runtim] is unknown: did you mean runtime?"),
        ({"SPLITPEER_POLICY__LEVELS": "[4"}, "not a TOML list"),
    ]:
        text = refused(peer, tmp_path, **environ)
        assert text.startswith(f"environment {next(iter(environ))}: ")
        assert expected in text
    text = refused(PeerConfig.load, write(tmp_path, CLIENT), {"log.level": "x"}, {})
    assert text.startswith("command line: [log] level must be")


def test_overrides_on_the_command_line() -> None:
    assert parse_override("log.level=debug") == ("log.level", "debug")
    assert parse_override("policy.levels = [3, 4]") == ("policy.levels", [3, 4])
    assert parse_override("data.images=/a=b") == ("data.images", "/a=b")
    for text in ("log.level", "level=debug", "=x", ".a=b", "a.=b"):
        assert "section.key=value" in refused(parse_override, text)


def test_addresses() -> None:
    assert served_address("tcp://hub.example.org:443") == ("hub.example.org", 443)
    assert served_address("tcp://[::1]:7443") == ("::1", 7443)
    assert served_address("tcp://*:7443") == ("*", 7443)
    for bad in (
        "tcp://hub",
        "hub:7443",
        "tcp://hub:0",
        "tcp://a b:1",
        "tcp://:7443",
        "ipc://x:1",
        "tcp://h:1\n",
    ):
        with pytest.raises(ValueError, match="write tcp://host"):
            served_address(bad)


# ---- certificates behind the settings


def test_the_certificate_must_say_what_the_file_says(tmp_path: Path) -> None:
    pki.create_ca(tmp_path / "pki", "demo", now=NOW)
    pki.issue(tmp_path / "pki", "client", "north", now=NOW)
    assert peer(tmp_path).credentials().identity.site == "north"
    for key, old, new in [
        ("site", 'site = "north"', 'site = "south"'),
        ("federation", 'federation = "demo"', 'federation = "other"'),
    ]:
        text = refused(peer(tmp_path, changed(CLIENT, old, new)).credentials)
        assert f"[peer] {key} is" in text
        assert "correct the one that is wrong" in text
    (tmp_path / "pki" / "north.key").chmod(0o644)
    assert "chmod 600" in refused(peer(tmp_path).credentials)


def test_allow_lists_come_from_the_files(tmp_path: Path) -> None:
    pki.create_ca(tmp_path / "pki", "demo", now=NOW)
    north = pki.issue(tmp_path / "pki", "client", "north", now=NOW).identity
    hub = pki.issue(tmp_path / "pki", "coordinator", "hub", now=NOW).identity
    peer(tmp_path).allow_list().check(hub, "demo")
    job(tmp_path).allow_list().check(north, "demo")
    with pytest.raises(NotAuthorised, match=r"job\.toml \[sites\]"):
        job(tmp_path).allow_list().check(hub, "demo")
    with pytest.raises(NotAuthorised, match=r"peer\.toml \[policy\] coordinators"):
        peer(tmp_path).allow_list().check(north, "demo")


# ---- files as other systems write them


def test_a_byte_order_mark_and_carriage_returns_are_read(tmp_path: Path) -> None:
    for text in (CLIENT, CLIENT.replace("\n", "\r\n")):
        (tmp_path / "peer.toml").write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert PeerConfig.load(tmp_path / "peer.toml", environ={}).peer.site == "north"
    (tmp_path / "job.toml").write_bytes(b"\xef\xbb\xbf" + JOB.encode())
    assert JobConfig.load(tmp_path / "job.toml").job.name == "glioma"
    (tmp_path / "peer.toml").write_bytes(CLIENT.encode("utf-16"))
    with pytest.raises(ConfigError, match="not UTF-8 text: save it as UTF-8"):
        PeerConfig.load(tmp_path / "peer.toml", environ={})


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (r'"C:\Users\radiology"', "in double quotes a backslash starts an escape"),
        (r'"D:\images"', "in double quotes a backslash starts an escape"),
        (r'"C:\temp\new"', "holds a control character: in double quotes a backslash"),
        (r"'C:\images'", "is a Windows path, but this program runs on Linux"),
        ('"C:/images"', "is a Windows path"),
        (r"'\\server\share\images'", "is a Windows path"),
    ],
)
def test_a_windows_path_gets_a_hint(tmp_path: Path, written: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        peer(tmp_path, changed(CLIENT, 'images = "images"', f"images = {written}"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a:b/images", "größe/T1 (2)", "C/images", "x\u00a0y"])
def test_other_names_of_folders_are_as_they_are(tmp_path: Path, name: str) -> None:
    loaded = peer(tmp_path, changed(CLIENT, 'images = "images"', f'images = "{name}"'))
    assert loaded.data.images == tmp_path / name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (CLIENT + "\nx = " + "[" * 5000, "nested too deeply"),
        (CLIENT + "\nx = " + "{a = " * 5000, "nested too deeply"),
        (changed(CLIENT, "threads = 1", "threads = " + "9" * 5000), "an integer has too many digits"),
        (changed(CLIENT, "threads = 1", "threads = " + "9" * 4000), "[runtime] threads must be less than"),
        (changed(CLIENT, "cache_mib = 1024", "cache_mib = " + "9" * 400), "[data] cache_mib must be less"),
        (changed(CLIENT, "reconnect_s = 300", "reconnect_s = " + "9" * 400), "[network] reconnect_s"),
        (CLIENT + "# " + "x" * (1 << 20), "larger than 1 MiB"),
    ],
)
def test_a_hostile_file_is_a_configuration_error(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        peer(tmp_path, text)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("text", ["[" * 5000, "[" + "9" * 5000 + "]", "[1"])
def test_a_hostile_list_from_the_environment_is_a_configuration_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="environment SPLITPEER_POLICY__LEVELS: not a TOML list"):
        peer(tmp_path, SPLITPEER_POLICY__LEVELS=text)


@pytest.mark.parametrize(
    ("written", "held"),
    [
        ("tcp://münchen.example:7443", "tcp://xn--mnchen-3ya.example:7443"),
        ("tcp://Hub.Example.Org.:7443", "tcp://hub.example.org:7443"),
        ("tcp://[fe80::1%eth0]:7443", "tcp://[fe80::1%eth0]:7443"),
        ("tcp://[fe80::1%25eth0]:7443", "tcp://[fe80::1%eth0]:7443"),
    ],
)
def test_addresses_are_held_in_one_spelling(tmp_path: Path, written: str, held: str) -> None:
    loaded = peer(tmp_path, changed(CLIENT, "tcp://coordinator.example.org:7443", written))
    assert loaded.network.coordinator == held


# ---- layouts


def test_files_may_be_named_by_a_pattern(tmp_path: Path) -> None:
    text = changed(CLIENT, 'layout = "folder"', 'files = "{patient}/T1*.nii.gz"')
    config = PeerConfig.load(write(tmp_path, text), environ={})
    assert config.data.layout == config.data.files == "{patient}/T1*.nii.gz"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            'layout = "bids"\nfiles = "{patient}.nii"',
            "layout and files both say how files are named: remove one",
        ),
        ('files = "T1.nii.gz"', "[data] files: pattern 'T1.nii.gz' does not say where the id is"),
        (
            'layout = "dicom"',
            "[data] layout: unknown layout 'dicom': name one of folder, patient-folders, bids",
        ),
        ('layout = "../{patient}.nii"', "[data] layout: pattern '../{patient}.nii' must be relative"),
    ],
)
def test_a_layout_that_cannot_be_is_told(tmp_path: Path, lines: str, expected: str) -> None:
    text = changed(CLIENT, 'layout = "folder"', lines)
    assert expected in refused(peer, tmp_path, text)
