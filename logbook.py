"""The log of a run. For people: lines on the screen and in train.log, and TensorBoard's curves, pictures and clips. For
programs: a line of metrics.jsonl for each set of curves and each event (progress.py)."""
import contextlib
import io
import json
import os
import re
import sys
import time
import uuid

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import checkpoint
import progress
from check_config import ConfigError
from device import is_out_of_memory


class Logbook:
    """Writes to `folder`. Only rank 0 logs, except that each rank reports oddities of the data that it read."""

    def __init__(self, folder, rank):
        self.folder, self.rank, self.noted, self.complained = folder, rank, set(), False
        self.board = self.copy = self.config = None  # TensorBoard's writer; the run at Weights & Biases; its settings
        self.drawn, self.missing = None, ""  # the newest step that has curves; why earlier curves are lost
        self.clock = None  # the run's Clock, as soon as it trains
        self.metrics = None  # metrics.jsonl; stays open until the process ends, since its last line comes after `close`

    def __call__(self, line, screen=True):
        if self.rank > 0:
            return
        if screen:
            tqdm.write(line)
        self.write(line)

    def write(self, line):
        with self.unharmed(), open(os.path.join(self.folder, "train.log"), "a", encoding="utf-8",
                                   errors="backslashreplace") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def event(self, kind, step, line, reason=None, screen=True):
        """Log a line for people, and for programs a line of metrics.jsonl. kind: one of those in docs/formats.md."""
        self(line, screen)
        self.record(kind, step, reason=reason)

    def record(self, kind, step, **values):
        """Write a line of metrics.jsonl, unbuffered. If the last line was cut off by a full disk or a kill, a newline
        ends it first. The file stays open: if the folder is removed, a new one of that name may be another run's."""
        if self.rank > 0:
            return
        line = progress.as_line(kind, step, values)
        with self.unharmed():
            if self.metrics is None:
                self.metrics = open(os.path.join(self.folder, progress.FILE), "a+b", buffering=0)  # noqa: SIM115
            self.metrics.seek(max(0, self.metrics.seek(0, os.SEEK_END) - 1))
            self.metrics.write(line if self.metrics.read(1) in (b"", b"\n") else b"\n" + line)

    @contextlib.contextmanager
    def unharmed(self):
        """A context in which OSErrors are ignored, and the first is reported on the screen: a full disk ends no run."""
        try:
            yield
        except OSError as error:
            self.complain(error)

    def complain(self, error):
        if not self.complained:
            self.complained = True
            print(f"the log in {self.folder} cannot be written: {error}; the run goes on", file=sys.stderr)

    def start(self, config, step):
        """Save the configuration and open TensorBoard's file. Remove curves beyond `step`, of a run that stopped."""
        if self.rank > 0:
            return
        self.config, self.drawn = config, step
        self.write_config()
        self.record("start", step)
        self.draw(step, lambda board: board.flush())

    def write_config(self):
        self("config: " + json.dumps(self.config), screen=False)
        with self.unharmed():
            content = json.dumps(self.config, indent=2).encode()
            checkpoint.write_atomically(os.path.join(self.folder, "config.json"), content)

    def start_again(self):
        """On rank 0, after the folder was removed and made again: begin new files."""
        self(f"warning: {self.folder} was removed, and with it what was saved; it is made again")
        self.write_config()
        self.metrics = None
        if self.board is not None:
            with self.unharmed():
                self.board.close()
            self.board, self.missing = None, "their folder was removed"

    def mirror(self, project, config, resumed):
        """If a project of Weights & Biases is named, have its package copy TensorBoard's curves there. Call this on
        rank 0, before `start`. A resumed run continues its curves. ConfigError if Weights & Biases fails."""
        if not project:
            return
        import wandb
        note = os.path.join(self.folder, "wandb_id.txt")
        identity = uuid.uuid4().hex[:12]
        if resumed and os.path.exists(note):
            with open(note) as file:
                identity = file.read().strip()
        try:
            self.copy = wandb.init(project=project, name=config["name"], id=identity, resume="allow", dir=self.folder,
                                   config=config, sync_tensorboard=True)
        except wandb.Error as error:  # no login, no network: WANDB_MODE=offline needs neither
            raise ConfigError(f"wandb={project}: {error}") from None
        with self.unharmed(), open(note, "w") as file:
            file.write(identity)

    def notes(self, notes):
        """Log the [(path, what was odd)] of a batch, on any rank: each once, with a number."""
        for note in notes:
            if note not in self.noted:
                self.noted.add(note)
                self.write(f"data, rank {self.rank}, oddity {len(self.noted)}: {note[0]}: {note[1]}")

    def draw(self, step, write):
        """Call write(board), which draws something of this step with TensorBoard's writer. Does nothing before `start`,
        and on other ranks than 0.

        A full disk ends the writer's thread, and so the writer; what it had not written is lost. As soon as there is
        room, a new writer begins a new file: in the old one, a record that was cut off would hide all that follows."""
        if self.drawn is None:
            return
        try:
            if self.board is not None:
                self.board.flush()  # raises the error that has ended the thread, if any; the queue is empty by now
        except OSError as error:
            self.board, self.missing = None, str(error)
            self.complain(error)
        try:
            if self.board is None:
                self.board = self.new_board()
                if self.missing:
                    self(f"step {step}: TensorBoard's curves go on, in a new file; some before this step "
                         f"are missing: {self.missing}")
                    self.missing = ""
            self.drawn = max(self.drawn, step)
            write(self.board)
        except OSError as error:
            self.board, self.missing = None, str(error)
            self.complain(error)

    def new_board(self):
        """A new writer of TensorBoard. OSError if the disk has no room for some curves. This is tried with another file
        first: the writer itself would leave a broken file, and its thread would print a traceback."""
        trial = os.path.join(self.folder, "curves.tmp")
        try:
            with open(trial, "wb") as file:
                file.write(bytes(1 << 16))
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(trial)
        self.rename_files_of_the_future()
        return SummaryWriter(self.folder, purge_step=self.drawn + 1)

    def rename_files_of_the_future(self):
        """Rename TensorBoard's files whose names hold a time in the future. TensorBoard reads files in the order of
        their names, which begin with the time. Each file drops the curves of earlier files from its own first step on.
        After the clock was set back, a new file would come before an old one, which would drop the new curves. So files
        of the future get names that come just before that of the new file, in their own order."""
        now = int(time.time())
        late = [name for name in os.listdir(self.folder)
                if (found := re.match(r"events\.out\.tfevents\.(\d+)", name)) and int(found[1]) > now]
        for name in late:  # "-" sorts before the "." that follows the time in other names
            os.rename(os.path.join(self.folder, name),
                      os.path.join(self.folder, name.replace("tfevents.", f"tfevents.{now:010d}-", 1)))
        if late:
            self("the clock was set back: TensorBoard's files of the future are renamed, so that their curves come "
                 "before the new ones; start a TensorBoard that shows them again")

    def scalars(self, step, group, **values):
        """Draw a step's values as curves, and write them as a line of metrics.jsonl, with the seconds of training. With
        group "train", loss=0.1 belongs to the curve train/loss. None is left out."""
        self.record(group, step, seconds=self.clock and self.clock.total(), **values)

        def write(board):
            for name, value in values.items():
                if value is not None:
                    board.add_scalar(f"{group}/{name}", value, step)
        self.draw(step, write)

    def pictures(self, step, shown):
        """Draw the middle frames of clips side by side, and the first clip as a moving picture. shown: [(original,
        reconstruction)], T 3 H W in [0, 1]."""
        def write(board):
            for i, (original, output) in enumerate(shown):
                pair = torch.cat([original, output], -1)  # T 3 H 2W
                board.add_image(f"val/clip_{i}", pair[len(pair) // 2], step)
                if i == 0 and len(pair) > 1:
                    self.moving_picture(board, "val/video", pair, step)
        self.draw(step, write)

    def moving_picture(self, board, name, frames, step):
        """Draw frames, T 3 H W in [0, 1], as an animated GIF. (SummaryWriter.add_video would need moviepy.)"""
        from PIL import Image  # comes with tensorboard
        from tensorboard.compat.proto.summary_pb2 import Summary
        images = [Image.fromarray(f) for f in (frames * 255).round().byte().permute(0, 2, 3, 1).numpy()]
        buffer = io.BytesIO()
        images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=120, loop=0)
        picture = Summary.Image(height=frames.shape[-2], width=frames.shape[-1], colorspace=3,
                                encoded_image_string=buffer.getvalue())
        board._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=picture)]), step)

    def close(self):
        if self.board is not None:
            with self.unharmed():
                self.board.close()
        if self.copy is not None:
            self.copy.finish()


class Clock:
    """Counts the seconds of training, without validation and saving. total: seconds before the run was resumed."""

    def __init__(self, total=0.0, monotonic=time.monotonic):
        self.monotonic, self.before, self.began, self.last, self.paused = monotonic, total, monotonic(), total, False

    def total(self):
        return self.before + (0.0 if self.paused else self.monotonic() - self.began)

    def lap(self):
        """Seconds since the last call."""
        last, self.last = self.last, self.total()
        return self.last - last

    @contextlib.contextmanager
    def stopped(self):
        """A context in which the clock stands still: something other than training is going on."""
        self.before, self.paused = self.total(), True
        yield
        self.began, self.paused = self.monotonic(), False


def summarize(model, bucket, autocast):
    """`summary` of the model. ConfigError if one clip does not fit into memory even without gradients."""
    try:
        with autocast:
            return summary(model, bucket.size, bucket.frames)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(f"out of memory with one clip of {bucket.frames} frames of {bucket.size}x{bucket.size}: set "
                          "size or frames lower") from None


def summary(model, size, frames):
    """A table, as text, of the parameters and output shape of every layer and of the whole model, for one clip of
    `frames` x `size` x `size`. A layer that is called for parts of the clip, as on CPUs, has one line with the frames
    of all its calls."""
    shapes, hooks = {}, []  # {text with a layer's name, class and parameters: shape of its output}
    for part, module in model.named_children():
        blocks = module.named_children() if isinstance(module, (torch.nn.Sequential, torch.nn.ModuleList)) else []
        for name, layer in [(f"{part}.{i}", block) for i, block in blocks] or [(part, module)]:
            row = f"{name + ' ' + type(layer).__name__:30} {count(layer):10,}"
            shapes[row] = None

            def note(layer, _, output, row=row):
                output = output[0] if isinstance(output, tuple) else output
                if torch.is_tensor(output):
                    before = shapes[row][0] if shapes[row] else 0
                    shapes[row] = (before + output.shape[0], *output.shape[1:])
            hooks.append(layer.register_forward_hook(note))
    video = torch.zeros(1, frames, 3, size, size, device=next(model.parameters()).device)
    training = model.training
    with torch.no_grad():
        output, info = model.eval()(video)
    model.train(training)
    for hook in hooks:
        hook.remove()
    return "\n".join([f"{'layer':30} {'parameters':>10}  output (frames, channels, height, width)",
                      *(f"{row}  {shape}" for row, shape in shapes.items() if shape),
                      f"{'all':30} {count(model):10,}  video {tuple(video.shape)} -> "
                      f"latents {tuple(info['latents'].shape)} -> video {tuple(output.shape)}"])


def count(module):
    return sum(p.numel() for p in module.parameters())
