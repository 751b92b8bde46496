"""What metrics of pictures that are drawn from captions have in common."""

from eval.judging.judges import Judges
from eval.judging.metric import PictureMetric, Prompt
from eval.judging.prompt_files import choose_captions


class CaptionMetric(PictureMetric):
    """A metric whose prompts are the captions that the judges name, one picture for each."""

    draws_captions = True

    def __init__(self, judges: Judges) -> None:
        self._judges = judges

    def prompts(self, count: int | None) -> list[Prompt]:
        return choose_captions(self._judges, count)
