"""The run's own settings, in sections; a function takes only the section that it needs.

``Config`` inherits from all sections, so that it can be passed wherever one is wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from pfedgpa_app.core.randomness import numpy_generator
from pfedgpa_app.core.settings import LAUNCH, LEARNING_RATES, TRACKERS, setting

DATASET_HELP = (
    "digits, mnist, fashion-mnist, kmnist, emnist-SPLIT (balanced, byclass, bymerge, digits, "
    "letters, mnist), cifar10, cifar100, svhn; imagefolder:PATH, a folder a class, maybe below "
    "train/ and test/; npz:PATH, arrays; hf:NAME, of the Hugging Face Hub; "
    "MODULE:CALLABLE of your own (docs/own.md); a relative PATH is below the current folder, "
    "else below data-dir; or nodes: each node's own, which its --node-config names as dataset"
)
MODEL_HELP = (
    "auto: by the shape of the data; the paper's digits, fashion and cifar; conv, for "
    "images of any size; mlp, for tables; torchvision:NAME; or MODULE:CALLABLE of your own, which "
    "makes one of (classes, shape) (docs/own.md)"
)
NODES = "nodes"  # the data set with which each node has its own data
TORCHVISION = "torchvision:"
MODELS = ("auto", "digits", "fashion", "cifar", "conv", "mlp")
PARTITIONS = ("dominant", "dirichlet", "shards", "iid", "natural")
OF_PARTITION = {  # {setting: the only partition that uses it}
    "uniform-share": "dominant",
    "group-shares": "dominant",
    "dirichlet-alpha": "dirichlet",
    "shards-per-client": "shards",
}
PARTITION_FILE = "file:"
LABEL_FLIP = "label-flip"
ATTACKS = ("none", "sign-flip", "scale", "noise", LABEL_FLIP)
MOST_CLIENTS = 1_000_000
S = TypeVar("S")


@dataclass(frozen=True)
class Basics:
    """What every section may use: the methods, the seed and the clients."""

    conf: str = setting(
        "demo",
        "experiment: a name in conf/ or the path of a YAML file; with another data set than "
        "digits, the default is own",
        part=LAUNCH,
    )
    method: tuple[str, ...] = setting(
        ("pfedgpa",), "methods to run on the same partition and seed, separated by commas"
    )
    code_dir: str = setting(
        "",
        "folder that your own MODULEs (model, dataset, method) are imported from, before what is "
        "installed; empty: the current one",
        part=LAUNCH,
    )
    seed: int = setting(0, "the run's only seed", low=0)
    num_clients: int = setting(10, "clients of the federation", low=1, high=MOST_CLIENTS)
    join_clients: int = setting(
        0, "so many clients, the last ones, join after the last round; 0: none", low=0
    )

    @property
    def initial_clients(self) -> int:
        """How many clients take part from the start; the others join after the last round."""
        return self.num_clients - self.join_clients


@dataclass(frozen=True)
class DataSettings(Basics):
    """The data set, and how it is dealt to clients."""

    dataset: str = setting("digits", DATASET_HELP)
    data_dir: str = setting(
        "", "where data sets lie; empty: $PFEDGPA_DATA, else ./data", part=LAUNCH
    )
    download: bool = setting(
        False, "let torchvision download the data set if it is absent", part=LAUNCH
    )
    image_size: int = setting(
        0, "imagefolder: resize to this square; 0: as they are", low=0, high=4096
    )
    test_share: float = setting(
        0.2, "share of each class that tests, of data that have no test split", above=0, high=0.9
    )
    classes: tuple[str, ...] = setting(
        (),
        "dataset=nodes: all classes by name, where a node may lack examples of some; empty: all "
        "nodes name the same",
    )
    partition: str = setting(
        "dominant",
        "how the data are dealt to clients: dominant, dirichlet, shards, iid; natural, by the "
        "users whom the data name; or file:PATH, JSON or CSV that maps samples to clients "
        "(docs/own.md)",
    )
    train_per_client: int | None = setting(
        600,
        "training images a client, validation included; auto: all there are, and no image twice",
        low=1,
    )
    test_per_client: int | None = setting(600, "test images a client; auto: likewise", low=1)
    uniform_share: float = setting(
        0.2, "dominant: share of a client's images uniform over all classes", low=0, high=1
    )
    group_shares: tuple[float, ...] = setting(
        (), "dominant: relative sizes of the hidden groups; empty: all alike", above=0, high=1e6
    )
    dirichlet_alpha: float = setting(0.5, "dirichlet: concentration", above=0, high=1e6)
    shards_per_client: int = setting(2, "shards: one-class shards a client", low=1)
    validation_share: float = setting(
        0.1, "share of a client's training images that it keeps for validation", low=0, high=0.9
    )

    @property
    def set_aside(self) -> int | None:
        """How many of ``train_per_client`` images are set aside for validation.

        None if that setting is "auto", so that clients hold different numbers.
        """
        size = self.train_per_client
        return None if size is None else round(size * self.validation_share)

    @property
    def why_no_validation(self) -> str:
        """Why clients have no validation images, in words; empty if they may have some."""
        if not self.validation_share:
            return "validation-share must be > 0"
        if self.set_aside != 0:
            return ""
        return (
            f"of train-per-client = {self.train_per_client} validation-share = "
            f"{self.validation_share:g} puts nothing aside"
        )


@dataclass(frozen=True)
class TrainingSettings(Basics):
    """The network, a client's training and its fine-tuning."""

    model: str = setting("auto", f"network; {MODEL_HELP}")
    model_weights: str = setting(
        "", "file of weights that the network starts from: safetensors, or torch's of tensors alone"
    )
    head: str = setting(
        "", "the network's last layer, by its module's name; empty: the one that is used last"
    )
    start_from: str = setting(
        "", "a run's distribution.safetensors, whose mean methods start from if they share weights"
    )
    device: str = setting("auto", "auto: a GPU when there is one", choices=("auto", "cpu", "cuda"))
    precision: str = setting(
        "float32",
        "what clients' training computes in; weights, updates and evaluation stay float32",
        choices=("float32", "bfloat16"),
    )
    local_epochs: int = setting(2, "epochs a client trains each round", low=1)
    batch_size: int = setting(50, "images a step", low=1)
    learning_rate: float = setting(0.01, "SGD learning rate", above=0, grid=LEARNING_RATES)
    momentum: float = setting(0.5, "SGD momentum", low=0, high=0.999)
    weight_decay: float = setting(5e-4, "SGD weight decay", low=0)
    augment: bool = setting(False, "random crop and flip of training images")
    logit_adjustment: bool = setting(
        False,
        "clients add the logarithms of their class frequencies to the shared classifier's bias, "
        "and take them off before they upload",
    )
    fine_tune_epochs: int = setting(1, "epochs of gentle fine-tuning", low=0)
    fine_tune_learning_rate: float = setting(0.002, "gentle fine-tuning's learning rate", above=0)
    fine_tune_grid_epochs: int = setting(
        0, "tuned fine-tuning tries 1..this many epochs; 0: no tuning", low=0, high=1000
    )
    fine_tune_grid_learning_rates: tuple[float, ...] = setting(
        (0.001, 0.002, 0.005, 0.02), "learning rates that tuned fine-tuning tries", above=0
    )


@dataclass(frozen=True)
class FederationSettings(Basics):
    """The rounds, who takes part in them, and which uploads are used."""

    num_server_rounds: int = setting(200, "rounds", low=1)
    fraction_train: float = setting(1.0, "share of clients sampled each round", above=0, high=1)
    join_iterations: int = setting(
        3, "how often one that joins trains, uploads and is sent weights", low=1
    )
    join_rate: float = setting(
        0.1,
        "learning rate of clients that join, in units of the run's, where trained weights await",
        above=0,
    )
    share_label_counts: bool = setting(
        False, "clients tell the server how many images of each class they hold"
    )
    evaluate_every: int = setting(
        5,
        "rounds between evaluations of all clients; the last five are evaluated, too; 0: none is",
        low=0,
    )
    timeout: float = setting(3600.0, "seconds that a round waits for replies", above=0, part=LAUNCH)
    min_uploads: int = setting(
        1, "usable uploads that a round needs; with fewer the run stops, and can be resumed", low=1
    )
    dropout_share: float = setting(
        0.0,
        "simulations: share of a round's clients that drop out and do nothing; min-uploads of "
        "them are left",
        low=0,
        high=1,
    )
    straggler_share: float = setting(
        0.0, "simulations: share of a round's clients whose upload comes too late", low=0, high=1
    )
    max_upload_norm: float = setting(
        100.0,
        "an upload so many times as large as the round's median is refused; 0: none is",
        low=0,
    )
    max_distance: float = setting(
        0.0,
        "an upload so many times as far from the median as is usual is refused; 0: none is",
        low=0,
    )

    @property
    def round_clients(self) -> int:
        """How many clients are sampled each round."""
        return max(1, round(self.fraction_train * self.initial_clients))

    @property
    def dropped_clients(self) -> int:
        """How many of a round's clients drop out; ``min_uploads`` are always left."""
        most = max(0, self.round_clients - self.min_uploads)
        return min(most, round(self.dropout_share * self.round_clients))

    @property
    def late_clients(self) -> int:
        """How many of a round's other clients are late; ``min_uploads`` are always left."""
        most = max(0, self.round_clients - self.min_uploads) - self.dropped_clients
        return min(most, round(self.straggler_share * self.round_clients))

    @property
    def round_uploads(self) -> int:
        """How many uploads a round gets in time, if no client fails by itself."""
        return self.round_clients - self.dropped_clients - self.late_clients


@dataclass(frozen=True)
class PrivacySettings(Basics):
    """Local differential privacy of uploads."""

    local_dp_epsilon: float = setting(
        0.0, "ε of each upload's local differential privacy (docs/privacy.md); 0: none", low=0
    )
    local_dp_delta: float = setting(1e-5, "its δ", above=0, high=0.5)
    local_dp_clip: float = setting(1.0, "its C: updates are clipped to this norm", above=0)
    max_epsilon: float = setting(
        0.0, "most ε that a run may spend on a client, or it is refused; 0: any", low=0, part=LAUNCH
    )


@dataclass(frozen=True)
class AttackSettings(Basics):
    """Malicious clients, in simulations."""

    attack: str = setting("none", "what malicious clients do, in simulations", choices=ATTACKS)
    malicious_share: float = setting(0.1, "share of the clients that attack", low=0, high=1)
    attack_strength: float = setting(
        4.0, "by how much updates are flipped, scaled or drowned in noise", above=0
    )

    @property
    def malicious_clients(self) -> frozenset[int]:
        """The clients that attack: a share of the initial clients, drawn by the run's seed."""
        if self.attack == "none":
            return frozenset()
        count = round(self.malicious_share * self.initial_clients)
        rng = numpy_generator(self.seed, "malicious")
        return frozenset(rng.choice(self.initial_clients, count, replace=False).tolist())


@dataclass(frozen=True)
class OutputSettings:
    """Where results go, and what is kept of a run."""

    out_dir: str = setting("results", "where results/<run>/ is made", part=LAUNCH)
    run_name: str = setting(
        "", "name of the run's folder; empty: made from data set and time", part=LAUNCH
    )
    save_weights: bool = setting(
        True, "write what the server makes for each client beside the results", part=LAUNCH
    )
    track: tuple[str, ...] = setting(
        (),
        "what shows the run's figures as it goes, separated by commas: tensorboard, wandb, mlflow; "
        "each wants pip install 'pfedgpa-app[…]'",
        choices=TRACKERS,
        part=LAUNCH,
    )
    report: bool = setting(True, "make the run's page, report.html, and its pictures", part=LAUNCH)
    save_uploads: bool = setting(False, "keep the buffered uploads beside the results", part=LAUNCH)
    uploads: str = setting(
        "", "make weights from a run's uploads.safetensors instead of running FedAvg's rounds"
    )
    checkpoint_every: int = setting(
        1,
        "rounds between checkpoints, from which a killed run can go on; 0: none",
        low=0,
        part=LAUNCH,
    )
    resume: bool = setting(
        False,
        "go on with the run of this out-dir and run-name where its last checkpoint is",
        part=LAUNCH,
    )


@dataclass(frozen=True)
class EngineSettings:
    """The engine that serves the clients, and its size."""

    engine: str = setting(
        "auto",
        "what serves the clients under `pfedgpa run`; auto: batched with a GPU, else process",
        choices=("auto", "ray", "process", "batched"),
        part=LAUNCH,
    )
    workers: int | None = setting(
        None,
        "clients served at the same time by ray and process; auto: one a core",
        low=1,
        part=LAUNCH,
    )


@dataclass(frozen=True)
class Config(
    EngineSettings,
    OutputSettings,
    AttackSettings,
    PrivacySettings,
    FederationSettings,
    TrainingSettings,
    DataSettings,
):
    """All settings of one run, fully resolved."""

    sections: tuple[Any, ...] = ()  # every method's own settings

    def of(self, kind: type[S]) -> S:
        """Return a method's own settings, of class ``kind``; its defaults if the run has none."""
        return next((section for section in self.sections if type(section) is kind), kind())


SECTIONS = {
    "basics": Basics,
    "data": DataSettings,
    "training": TrainingSettings,
    "federation": FederationSettings,
    "privacy": PrivacySettings,
    "attack": AttackSettings,
    "output": OutputSettings,
    "engine": EngineSettings,
}
