"""Checks across settings: those that contradict each other, and those that nothing uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pfedgpa_app.config.names import (
    is_idle,
    keys,
    require_dataset,
    require_method,
    require_model,
    require_partition,
)
from pfedgpa_app.core.sections import (
    ATTACKS,
    LABEL_FLIP,
    NODES,
    OF_PARTITION,
    PARTITION_FILE,
    Config,
)
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.data import HUGGING_FACE, IMAGEFOLDER
from pfedgpa_app.methods import METHODS, federation_of, federations, name_of, rounds_class
from pfedgpa_app.methods.baselines import FromUploads
from pfedgpa_app.methods.fedavg import FedAvg
from pfedgpa_app.methods.generation import ROUNDS, Generation, PFedGPASettings
from pfedgpa_app.methods.own import reference_of

OF_NETWORK = ("fit-steps", "fit-batch-size", "fit-learning-rate", "width", "blocks", "ema")
RUN_CONFIG = "run-config"  # the source of what is given for this run alone


def check(config: Config, sources: Mapping[str, str]) -> None:
    """Refuse a configuration in which every value alone is right, but not all of them together.

    Args:
        sources: {setting: where its value came from}.

    Raises:
        ConfigError: what is wrong with it, and what to do.
    """
    _refuse_idle(config, sources)
    _check(config)
    _check_attack(config, sources)


def _given(sources: Mapping[str, str]) -> list[str]:
    """Return the settings that are given for this run alone."""
    return [name for name, source in sources.items() if source == RUN_CONFIG]


def _refuse_idle(config: Config, sources: Mapping[str, str]) -> None:
    """Refuse settings given for this run that neither its methods nor its partition use."""
    for name in _given(sources):
        if name == "partition" and config.dataset == NODES:
            raise ConfigError(
                f"partition = {config.partition} (run-config): is for one shared data set; "
                "with dataset = nodes every node has its own"
            )
        if not is_idle(keys()[name], config):
            continue
        if name in OF_PARTITION:
            raise ConfigError(
                f"{name} (run-config): partition = {config.partition} does not use it, but "
                f"partition={OF_PARTITION[name]} does"
            )
        raise ConfigError(
            f"{name} (run-config): none of this run's methods ({', '.join(config.method)}) uses it"
        )


def _check(config: Config) -> None:
    """Refuse values that do not fit together."""
    for name in config.method:
        require_method(name, "method", config.code_dir)
    if len(set(config.method)) < len(config.method):
        raise ConfigError(f"method = {','.join(config.method)}: names a method twice")
    require_model(config.model)
    _check_data(config)
    kept = name_of(FromUploads.of)  # the federation whose uploads are kept
    others = [method for method in config.method if federation_of(method) != kept]
    if config.uploads and others:
        raise ConfigError(
            f"uploads: are from {METHODS[kept].title}'s rounds, but {', '.join(others)} has "
            "rounds of its own"
        )
    if config.join_clients >= config.num_clients:
        raise ConfigError(
            f"join-clients = {config.join_clients}: must be less than num-clients = "
            f"{config.num_clients}"
        )
    if config.min_uploads > config.round_clients:
        raise ConfigError(
            f"min-uploads = {config.min_uploads}: is more than a round has; by fraction-train, "
            f"{config.round_clients} of {config.initial_clients} clients take part in a round"
        )
    _check_missing(config)
    if config.dataset == NODES and config.attack != "none":
        raise ConfigError(
            f"attack = {config.attack}: is for simulations; real nodes would really attack"
        )
    for name in config.method:
        METHODS[name].check(config)
    if config.fine_tune_grid_epochs and (why := config.why_no_validation):
        raise ConfigError(f"fine-tune-grid-epochs > 0 needs validation images: {why}")
    size, aside = config.train_per_client, config.set_aside
    if size is not None and aside is not None and size - aside < 1:
        raise ConfigError("validation-share leaves no image to train on")


def _check_data(config: Config) -> None:
    """Refuse settings of the data that do not fit together."""
    require_dataset(config.dataset, "dataset")
    require_partition(config.partition)
    resized = config.dataset.startswith((IMAGEFOLDER, HUGGING_FACE)) or config.dataset == NODES
    if config.image_size and not resized:
        raise ConfigError(
            f"image-size = {config.image_size}: resizes only images of imagefolder: and hf:, and "
            f"dataset = {config.dataset} is neither"
        )
    if config.classes and config.dataset != NODES:
        raise ConfigError(
            f"classes: can be named only for dataset = nodes; {config.dataset} has its own"
        )
    if len(config.classes) == 1 or len(set(config.classes)) < len(config.classes):
        raise ConfigError(
            f"classes = {','.join(config.classes)}: must be two or more different names"
        )


def _check_missing(config: Config) -> None:
    """Refuse drop-outs and stragglers on real nodes, and shares that come to no client."""
    if config.dataset == NODES and config.dropout_share + config.straggler_share:
        raise ConfigError(
            "dropout-share, straggler-share: are for simulations; real nodes fail anyway"
        )
    shares = {"dropout-share": config.dropout_share, "straggler-share": config.straggler_share}
    for name, share in shares.items():
        if share and not round(share * config.round_clients):
            raise ConfigError(
                f"{name} = {share:g}: comes to none of a round's {config.round_clients} clients; "
                f"{name}={1 / config.round_clients:.2g} makes it one"
            )


def _check_attack(config: Config, sources: Mapping[str, str]) -> None:
    """Refuse an attack by nobody: a federation without one would look robust to it."""
    share, clients = config.malicious_share, config.initial_clients
    if config.attack == "none":
        there = sources["attack"]  # a "none" from the same source or a later one is meant
        given = {"malicious-share": share, "attack-strength": config.attack_strength}
        for name, value in given.items() if share else ():
            here = sources[name]
            if here != "default" and (there == "default" or here == RUN_CONFIG != there):
                raise ConfigError(
                    f"{name} = {value:g} ({here}): without an attack no client is malicious; "
                    f"set attack, too: {', '.join(ATTACKS)}"
                )
        return
    count = len(config.malicious_clients)
    if clients == 1:
        raise ConfigError(
            f"attack = {config.attack}: needs an honest client beside a malicious one, but only 1 "
            "takes part from the start"
        )
    if count == clients:
        raise ConfigError(
            f"malicious-share = {share:g}: leaves none of {clients} clients honest to evaluate"
        )
    if not count:
        raise ConfigError(
            f"attack = {config.attack}: malicious-share = {share:g} of {clients} clients "
            f"makes none malicious; malicious-share={1 / clients:.2g} makes one malicious"
        )


def without_effect(config: Config, sources: Mapping[str, str], own_test: bool) -> Iterator[str]:
    """Yield, in words, which settings given for this run have no effect, and why.

    The reason is another setting, or the data.

    Args:
        sources: {setting: where its value came from}.
        own_test: whether the run's data set has a test split.
    """
    why: dict[str, str] = {}
    if all_of_it := _all_of_it(config):
        numbers = {
            "train-per-client": config.train_per_client,
            "test-per-client": config.test_per_client,
        }
        why |= {name: all_of_it for name, number in numbers.items() if number is not None}
    if not config.local_dp_epsilon:
        none = "without local-dp-epsilon nothing is clipped and no noise is added"
        why |= dict.fromkeys(("local-dp-clip", "local-dp-delta"), none)
    why |= _idle_in_joining(config)
    if not config.fine_tune_grid_epochs:
        why["fine-tune-grid-learning-rates"] = "fine-tune-grid-epochs = 0: no fine-tuning is tuned"
    if config.share_label_counts and not _reads_label_counts(config):
        why["share-label-counts"] = "only pfedgpa.descriptor=labels uses them"
    kept = name_of(FromUploads.of)
    if not any(federation_of(method) == kept for method in config.method):
        why["save-uploads"] = f"only {METHODS[kept].title}'s are kept, and no method has its rounds"
    why |= _idle_in_rounds(config) | _idle_in_generation(config)
    if config.engine == "batched":
        why |= dict.fromkeys(("workers", "timeout"), "engine = batched has no workers to wait for")
    if own_test:
        why["test-share"] = f"{config.dataset} has a test split"
    given = _given(sources)
    for name, reason in why.items():
        if name in given:
            yield f"{name} has no effect: {reason}"
    if "learning-rate" in given:
        yield from _other_rates(config, sources)
    for federation in federations(config.method):
        for name, reason in rounds_class(federation).unused.items():
            if name in given:
                yield f"{name} has no effect on {METHODS[federation].title}'s rounds: {reason}"


def _idle_in_joining(config: Config) -> dict[str, str]:
    """Return {setting: why} of settings without effect on clients that join, or as nobody does."""
    if not config.join_clients:
        joining = ("join-rate", "join-iterations", "pfedgpa.join-mode")
        return dict.fromkeys(joining, "join-clients = 0: nobody joins")
    if any(issubclass(rounds_class(name), FedAvg) for name in federations(config.method)):
        return {}
    return {"join-rate": "only the rounds of FedAvg, and of what extends it, use it"}


def _idle_in_rounds(config: Config) -> dict[str, str]:
    """Return {setting: why} of settings without effect in such small rounds or this attack."""
    why: dict[str, str] = {}
    left = f"min-uploads = {config.min_uploads} of a round's {config.round_clients} are always left"
    if config.dropout_share and not config.dropped_clients:
        why["dropout-share"] = left
    if config.straggler_share and not config.late_clients:
        why["straggler-share"] = left
    if config.max_distance and config.round_uploads < 3:
        many = f"a round has {config.round_uploads} uploads"
        why["max-distance"] = f"{many}, and comparing takes three or more"
    if config.attack == LABEL_FLIP:
        why["attack-strength"] = f"attack = {LABEL_FLIP} has no strength"
    return why


def _idle_in_generation(config: Config) -> dict[str, str]:
    """Return {setting: why} of pFedGPA's settings that its others leave without effect."""
    kinds = [kind for name in config.method if issubclass(kind := METHODS[name], Generation)]
    own, why = config.of(PFedGPASettings), dict[str, str]()
    denoisers = {own.denoiser} | {own.round_denoiser for kind in kinds if ROUNDS in kind.parts}
    if denoisers <= {"gaussian", "finite-set"}:
        closed = f"pfedgpa.denoiser = {own.denoiser} is a closed form"
        why |= dict.fromkeys(OF_NETWORK, closed)
    if own.autoencoder != "conv":
        exact = f"pfedgpa.autoencoder = {own.autoencoder} is not trained"
        why |= dict.fromkeys(("chunk-latents", "autoencoder-steps"), exact)
    if own.inversion != "invert":
        why["keep"] = f"pfedgpa.inversion = {own.inversion} replays no noise"
    for kind in kinds[:1]:
        of_all = set(kind.ignored).intersection(*(other.ignored for other in kinds))
        if not config.join_clients:
            why |= dict.fromkeys(of_all, f"{kind.title} does without it")
    return {f"pfedgpa.{name}": reason for name, reason in why.items()}


def _all_of_it(config: Config) -> str:
    """Say why clients hold all of their data, whatever its size; empty if numbers are dealt."""
    if config.dataset == NODES:
        return "with dataset = nodes each node uses all of its own data"
    if config.partition == "natural" or config.partition.startswith(PARTITION_FILE):
        return f"with partition = {config.partition} clients hold all that is theirs"
    return ""


def _other_rates(config: Config, sources: Mapping[str, str]) -> Iterator[str]:
    """Yield, in words, which federations ignore learning-rate for rates of their own."""
    for name in federations(config.method):
        rates = rounds_class(name).rate_settings(name, config)
        if "learning-rate" not in rates and all(sources.get(r) == "default" for r in rates):
            yield (
                f"learning-rate has no effect on {METHODS[name].title}'s rounds, which use "
                f"{' and '.join(rates)}; only its fine-tuning uses it"
            )


def _reads_label_counts(config: Config) -> bool:
    """Whether a method uses the class counts that clients share; a user's own method may."""
    if any(reference_of(name) != name for name in config.method):
        return True
    descriptor = keys()["pfedgpa.descriptor"]
    return config.of(PFedGPASettings).descriptor == "labels" and not is_idle(descriptor, config)
