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
    "letters, mnist), cifar10, cifar100, svhn; imagefolder:PATH with a folder per class, maybe "
    "below train/ and test/; npz:PATH, arrays; hf:NAME, from the Hugging Face Hub; "
    "MODULE:CALLABLE, what your own function returns, also tables (docs/own.md); a relative PATH "
    "is looked up below the current folder, else below data-dir; or nodes: each node's own data, "
    "which dataset in its --node-config names"
)
MODEL_HELP = (
    "auto: by the shape of the data; digits, fashion and cifar: the paper's; conv: for images of "
    "any size; mlp: for tables; torchvision:NAME; or MODULE:CALLABLE, your own, called with "
    "(classes, shape) (docs/own.md)"
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
        "the experiment to start from: a name in conf/, or the path of a YAML file; the "
        "default is own if a data set other than digits is given",
        part=LAUNCH,
    )
    method: tuple[str, ...] = setting(
        ("pfedgpa",), "methods to run on the same partition and seed, separated by commas"
    )
    code_dir: str = setting(
        "",
        "folder from which your own modules (model, dataset, method) are imported, before "
        "installed ones; empty: the current folder",
        part=LAUNCH,
    )
    seed: int = setting(
        0,
        "the run's only seed; neither the split by test-share nor local-dp-epsilon's noise uses it",
        low=0,
    )
    num_clients: int = setting(10, "number of clients in the federation", low=1, high=MOST_CLIENTS)
    join_clients: int = setting(
        0, "number of clients, the last ones, that join only after the last round", low=0
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
        "", "folder of the data sets; empty: $PFEDGPA_DATA, else ./data", part=LAUNCH
    )
    download: bool = setting(
        False, "whether the data set may be downloaded if it is absent", part=LAUNCH
    )
    image_size: int = setting(
        0,
        "imagefolder, hf, nodes: side in pixels of the square that images are resized to; 0: not "
        "resized",
        low=0,
        high=4096,
    )
    test_share: float = setting(
        0.2, "share of each class to test on, for data without a test split", above=0, high=0.9
    )
    classes: tuple[str, ...] = setting(
        (),
        "dataset=nodes: the names of all classes, if some nodes lack examples of some "
        "classes; empty: all nodes have the same classes",
    )
    partition: str = setting(
        "dominant",
        "how the data are dealt to clients: dominant, dirichlet, shards, iid; natural, by the "
        "users whom the data name; or file:PATH, JSON or CSV that maps samples to clients "
        "(docs/own.md)",
    )
    train_per_client: int | None = setting(
        600,
        "training images per client, validation images included; auto: all images are dealt, "
        "each to one client",
        low=1,
    )
    test_per_client: int | None = setting(
        600, "test images per client; auto: as for train-per-client", low=1
    )
    uniform_share: float = setting(
        0.2,
        "dominant: share of a client's images that is drawn uniformly from all classes",
        low=0,
        high=1,
    )
    group_shares: tuple[float, ...] = setting(
        (), "dominant: relative sizes of the hidden groups; empty: equal", above=0, high=1e6
    )
    dirichlet_alpha: float = setting(
        0.5, "dirichlet: concentration α; the smaller, the more clients differ", above=0, high=1e6
    )
    shards_per_client: int = setting(2, "shards: number of one-class shards per client", low=1)
    validation_share: float = setting(
        0.1, "share of a client's training images that is set aside for validation", low=0, high=0.9
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
            f"validation-share = {self.validation_share:g} of train-per-client = "
            f"{self.train_per_client} sets no image aside"
        )


@dataclass(frozen=True)
class TrainingSettings(Basics):
    """The network, a client's training and its fine-tuning."""

    model: str = setting("auto", f"network; {MODEL_HELP}")
    model_weights: str = setting(
        "",
        "file of weights that the network starts from: safetensors, or a torch file that "
        "holds only tensors",
    )
    head: str = setting(
        "",
        "module name of the network's last layer, the classifier; empty: the layer that is "
        "used last",
    )
    start_from: str = setting(
        "",
        "folder of another run, or its distribution.safetensors; methods that share weights start "
        "from its mean",
    )
    device: str = setting(
        "auto", "device to compute on; auto: a GPU if there is one", choices=("auto", "cpu", "cuda")
    )
    precision: str = setting(
        "float32",
        "number format of clients' training; weights, updates and evaluation stay float32",
        choices=("float32", "bfloat16"),
    )
    local_epochs: int = setting(2, "epochs that a client trains per round", low=1)
    batch_size: int = setting(50, "images per training step", low=1)
    learning_rate: float = setting(
        0.01, "learning rate of clients' SGD", above=0, grid=LEARNING_RATES
    )
    momentum: float = setting(0.5, "momentum of clients' SGD", low=0, high=0.999)
    weight_decay: float = setting(5e-4, "weight decay of clients' SGD", low=0)
    augment: bool = setting(False, "whether training images are randomly cropped and flipped")
    logit_adjustment: bool = setting(
        False,
        "clients add the logarithms of their class frequencies to the shared classifier's bias, "
        "and take them off before they upload",
    )
    fine_tune_epochs: int = setting(1, "epochs of fine-tuning after the last round", low=0)
    fine_tune_learning_rate: float = setting(
        0.002, "learning rate of fine-tuning after the last round", above=0
    )
    fine_tune_grid_epochs: int = setting(
        0, "most epochs that tuned fine-tuning tries, from 1 on; 0: no tuning", low=0, high=1000
    )
    fine_tune_grid_learning_rates: tuple[float, ...] = setting(
        (0.001, 0.002, 0.005, 0.02), "learning rates that tuned fine-tuning tries", above=0
    )


@dataclass(frozen=True)
class FederationSettings(Basics):
    """The rounds, who takes part in them, and which uploads are used."""

    num_server_rounds: int = setting(200, "number of rounds", low=1)
    fraction_train: float = setting(
        1.0, "share of the clients that take part in a round", above=0, high=1
    )
    join_iterations: int = setting(
        3, "how many times a joining client trains, uploads and is sent weights", low=1
    )
    join_rate: float = setting(
        0.1,
        "learning rate of clients that join FedAvg's, FedAvgM's or pFedGPA's rounds, as a multiple "
        "of the run's",
        above=0,
    )
    share_label_counts: bool = setting(
        False, "whether clients tell the server how many images of each class they hold"
    )
    evaluate_every: int = setting(
        5,
        "rounds between evaluations of all clients, who are also evaluated in the first round and "
        "the last five; 0: no evaluation during rounds",
        low=0,
    )
    timeout: float = setting(
        3600.0, "seconds that a round waits for clients' replies", above=0, part=LAUNCH
    )
    min_uploads: int = setting(
        1, "usable uploads that a round needs; with fewer, the run stops and can be resumed", low=1
    )
    dropout_share: float = setting(
        0.0,
        "simulations: share of a round's clients that drop out; min-uploads clients are "
        "always left",
        low=0,
        high=1,
    )
    straggler_share: float = setting(
        0.0, "simulations: share of a round's clients whose uploads come too late", low=0, high=1
    )
    max_upload_norm: float = setting(
        100.0,
        "refuse an upload that is this many times as large as the round's median; 0: refuse none",
        low=0,
    )
    max_distance: float = setting(
        0.0,
        "refuse an upload that is this many times as far from the round's median as the "
        "usual one; 0: refuse none",
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
        0.0, "ε of each upload's local differential privacy (docs/privacy.md); 0: no noise", low=0
    )
    local_dp_delta: float = setting(
        1e-5, "δ of each upload's local differential privacy", above=0, high=0.5
    )
    local_dp_clip: float = setting(
        1.0, "C, the norm that updates are clipped to for local differential privacy", above=0
    )
    max_epsilon: float = setting(
        0.0,
        "refuse a run that spends more than this ε of a client's privacy; 0: refuse none",
        low=0,
        part=LAUNCH,
    )


@dataclass(frozen=True)
class AttackSettings(Basics):
    """Malicious clients, in simulations."""

    attack: str = setting("none", "simulations: what malicious clients do", choices=ATTACKS)
    malicious_share: float = setting(
        0.1, "share of the clients that are malicious, if attack is set", low=0, high=1
    )
    attack_strength: float = setting(
        4.0, "factor by which an attack scales updates, or its noise", above=0
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

    out_dir: str = setting("results", "folder in which the run's folder is made", part=LAUNCH)
    run_name: str = setting(
        "", "name of the run's folder; empty: made of data set, clients, seed and time", part=LAUNCH
    )
    save_weights: bool = setting(
        True,
        "whether the weights made for each client are written to the run's folder",
        part=LAUNCH,
    )
    track: tuple[str, ...] = setting(
        (),
        "dashboards that get the run's figures while it runs, separated by commas; each "
        "needs pip install 'pfedgpa-app[NAME]'",
        choices=TRACKERS,
        part=LAUNCH,
    )
    report: bool = setting(
        True, "whether the run's page, report.html, and its pictures are made", part=LAUNCH
    )
    save_uploads: bool = setting(
        False,
        "whether the uploads that the server remembers are written to the run's folder",
        part=LAUNCH,
    )
    uploads: str = setting(
        "",
        "uploads.safetensors of another run; weights are made from it, and FedAvg's rounds "
        "are not run",
    )
    checkpoint_every: int = setting(
        1,
        "rounds between checkpoints, from which a killed run can be resumed; 0: no checkpoints",
        low=0,
        part=LAUNCH,
    )
    resume: bool = setting(
        False,
        "continue the run of this out-dir and run-name from its last checkpoint",
        part=LAUNCH,
    )


@dataclass(frozen=True)
class EngineSettings:
    """The engine that serves the clients, and its size."""

    engine: str = setting(
        "auto",
        "what runs the clients under `pfedgpa run`; auto: batched with a GPU, else process",
        choices=("auto", "ray", "process", "batched"),
        part=LAUNCH,
    )
    workers: int | None = setting(
        None,
        "clients that ray and process run at the same time; auto: one per core",
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
