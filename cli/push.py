"""``mvision push``."""

from __future__ import annotations

from pathlib import Path

import click

from mvision.cli.options import EXISTING_FILE, echo


@click.command(short_help="Publish a run on the Hugging Face Hub.")
@click.argument("run", metavar="RUN")
@click.argument("repo_id", metavar="USER/NAME")
@click.option("--private", is_flag=True, help="Only you can see the new repository.")
@click.option("--revision", metavar="BRANCH", help="A branch, which is created if it is new.  [default: main]")
@click.option("--message", metavar="TEXT", help="Of the commit.  [default: Push model with mvision ...]")
@click.option("--create-pr", is_flag=True, help="Propose it as a pull request, for a repository of others.")
@click.option("--license", metavar="L", help="For the card: apache-2.0, mit, cc-by-4.0, other, ...")
@click.option(
    "--dataset", "datasets", multiple=True, metavar="ID", help="For the card: a data set on the Hub. Repeatable."
)
@click.option("--example", type=EXISTING_FILE, metavar="PICTURE", help="For the card: shown with what is found in it.")
@click.option("--no-pictures", is_flag=True, help="Without predictions.jpg, which shows validation images.")
def push(
    run: str,
    repo_id: str,
    private: bool,
    revision: str | None,
    message: str | None,
    create_pr: bool,
    license: str | None,
    datasets: tuple[str, ...],
    example: Path | None,
    no_pictures: bool,
) -> None:
    """Put the weights of RUN, a run folder or any weights, into a repository of the Hugging Face Hub, in one commit.

    With them go a model card with the run's figures, settings and pictures, and code that loads the model. A repository
    that does not exist is created; one that exists gets a new commit. The token is that of 'hf auth login' or of the
    environment variable HF_TOKEN.

    \b
    Example:
      mvision push runs/detection/1 user/name --private --license apache-2.0
    """
    from mvision.commands.push import push

    push(
        run,
        repo_id,
        private=private,
        branch=revision,
        message=message,
        create_pr=create_pr,
        license=license,
        datasets=datasets,
        example=example,
        pictures=not no_pictures,
        log=echo,
    )
