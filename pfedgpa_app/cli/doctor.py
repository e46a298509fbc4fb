"""Checks a node's versions, data, keys and connection before a run."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from pfedgpa_app.cli.options import check_number, items

EXAMPLE = "doctor --dataset imagefolder:/data/scans --superlink superlink.example.org:9092"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--dataset", default="", help="the node's data: imagefolder:PATH, …")
    parser.add_argument("--data-dir", default="", help="folder of other data sets")
    parser.add_argument("--image-size", type=int, default=0, help="the run's image-size")
    parser.add_argument("--classes", default="", help="the run's classes, as cat,dog")
    parser.add_argument("--model", default="auto", help="the run's model")
    parser.add_argument("--superlink", default="", help="HOST:PORT")
    parser.add_argument("--root-certificates", default="", help="the authority's certificate")
    parser.add_argument("--auth-supernode-private-key", default="", help="the node's key")
    parser.add_argument("--state-dir", default="", help="the node's state-dir")


def handle(options: Namespace) -> int:
    from pfedgpa_app.config.names import require_dataset
    from pfedgpa_app.deployment.doctor import Node, examine

    if options.dataset:
        require_dataset(options.dataset, "--dataset")
    if options.image_size:
        check_number("--image-size", options.image_size, 4096)
    node = Node(
        dataset=options.dataset,
        data_dir=options.data_dir,
        image_size=options.image_size,
        classes=tuple(items("--classes", options.classes)) if options.classes else (),
        model=options.model,
        superlink=options.superlink,
        certificates=options.root_certificates,
        key=options.auth_supernode_private_key,
        state_dir=options.state_dir,
    )
    healthy = True
    for name, good, text in examine(node):
        print(f"{'ok  ' if good else 'FAIL'}  {name:<12} {text}", flush=True)
        healthy &= good
    return 0 if healthy else 1
