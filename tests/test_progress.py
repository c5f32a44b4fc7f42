"""What a log says of how far a job is."""

from edgereg.progress import _lines


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_line_every_half_minute_with_the_time_left(capsys):
    clock = Clock()
    report = _lines("train resnet", 240, clock)
    for done in range(1, 81):  # a unit a second
        clock.now += 1
        report(done, "loss 1.000, 60.0%")
    assert capsys.readouterr().err.splitlines() == [
        "train resnet: 30/240 loss 1.000, 60.0%, 0:03:30 left",
        "train resnet: 60/240 loss 1.000, 60.0%, 0:03:00 left",
    ]


def test_what_was_done_before_a_resume_does_not_count_as_speed(capsys):
    clock = Clock()
    report = _lines("train resnet", 240, clock)
    for done in range(201, 231):  # a unit in two seconds
        clock.now += 2
        report(done, "")
    first, last = capsys.readouterr().err.splitlines()
    assert first == "train resnet: 215/240, 0:00:50 left"
    assert last == "train resnet: 230/240, 0:00:20 left"
