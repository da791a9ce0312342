"""What a run says of itself: for people, lines on the screen and in train.log, TensorBoard's curves, pictures and
clips; for programs, a line of metrics.jsonl for each set of curves and each event (progress.py)."""
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
    """Writes to `folder`. Only rank 0 speaks, except that each rank notes oddities of the data that it met."""

    def __init__(self, folder, rank):
        self.folder, self.rank, self.noted, self.complained = folder, rank, set(), False
        self.board = self.copy = self.config = None  # TensorBoard's writer; the run at Weights & Biases; its settings
        self.drawn, self.missing = None, ""  # the newest step that has curves; why some before it have got lost
        self.clock = None  # the run's Clock, as soon as it trains
        self.metrics = None  # metrics.jsonl: open until the process ends, for its last line comes after `close`

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
        """A line for people, and for programs its kind, a word of docs/formats.md."""
        self(line, screen)
        self.record(kind, step, reason=reason)

    def record(self, kind, step, **values):
        """A line of metrics.jsonl, written at once. A line that was cut off, by a full disk or a kill, ends first.
        The file stays open: after the folder was removed, the next of that name may be another run's."""
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
        """A full disk must not end a run: what cannot be logged is said once, on the screen, and left out."""
        try:
            yield
        except OSError as error:
            self.complain(error)

    def complain(self, error):
        if not self.complained:
            self.complained = True
            print(f"the log in {self.folder} cannot be written: {error}; the run goes on", file=sys.stderr)

    def start(self, config, step):
        """Save the resolved configuration, open TensorBoard's file; curves past `step` are a stopped run's, and go."""
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
        """In a folder that was removed and is made again, on rank 0: new files from here on."""
        self(f"warning: {self.folder} was removed, and with it what was saved; it is made again")
        self.write_config()
        self.metrics = None
        if self.board is not None:
            with self.unharmed():
                self.board.close()
            self.board, self.missing = None, "their folder was removed"

    def mirror(self, project, config, resumed):
        """Copy the curves to a project of Weights & Biases, if one is named, by its own means; call it on rank 0,
        before `start`. A resumed run goes on with the same curves there. ConfigError for what goes wrong there."""
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
        """[(path, what was odd)] of a batch: each once, counted, from whichever rank met it."""
        for note in notes:
            if note not in self.noted:
                self.noted.add(note)
                self.write(f"data, rank {self.rank}, oddity {len(self.noted)}: {note[0]}: {note[1]}")

    def draw(self, step, write):
        """write(TensorBoard's writer), which is to draw something of this step. A full disk ends the writer's thread,
        and that writer for good: what it held is lost, and another goes on as soon as there is room, in a file of its
        own, for a record that was cut off hides what follows in the same one. Before `start`, and on other ranks than
        the first, it does nothing."""
        if self.drawn is None:
            return
        try:
            if self.board is not None:
                self.board.flush()  # raises what has ended the thread; its queue has long been empty
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
        """TensorBoard's writer. OSError where there is no room for some curves: tried with another file, since the
        writer would leave one more broken one behind, and its thread a traceback on the screen."""
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
        """TensorBoard reads files in the order of their names, in which the time comes first, and each drops the steps
        that it goes on from. After the clock was set back a new file would come before an old one, and lose all its
        curves. So those of the future get names that come just before the new one, in their own order."""
        now = int(time.time())
        late = [name for name in os.listdir(self.folder)
                if (found := re.match(r"events\.out\.tfevents\.(\d+)", name)) and int(found[1]) > now]
        for name in late:  # - is before the . that follows the time in other names
            os.rename(os.path.join(self.folder, name),
                      os.path.join(self.folder, name.replace("tfevents.", f"tfevents.{now:010d}-", 1)))
        if late:
            self("the clock was set back: TensorBoard's files of the future are renamed, so that their curves come "
                 "before the new ones; start a TensorBoard that shows them again")

    def scalars(self, step, group, **values):
        """Curves: group "train", loss=0.1 is drawn as train/loss; None is left out. And a line of metrics.jsonl, which
        has the seconds of training too."""
        self.record(group, step, seconds=self.clock and self.clock.total(), **values)

        def write(board):
            for name, value in values.items():
                if value is not None:
                    board.add_scalar(f"{group}/{name}", value, step)
        self.draw(step, write)

    def pictures(self, step, shown):
        """[(original, reconstruction)], T 3 H W in [0, 1]: middle frames side by side, and the first clip moving."""
        def write(board):
            for i, (original, output) in enumerate(shown):
                pair = torch.cat([original, output], -1)  # T 3 H 2W
                board.add_image(f"val/clip_{i}", pair[len(pair) // 2], step)
                if i == 0 and len(pair) > 1:
                    self.moving_picture(board, "val/video", pair, step)
        self.draw(step, write)

    def moving_picture(self, board, name, frames, step):
        """T 3 H W in [0, 1] as an animated GIF; SummaryWriter.add_video would need moviepy."""
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
    """Seconds of training alone, validation and saving left out; `total`: those of the run before it was resumed."""

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
        """While something else than training goes on."""
        self.before, self.paused = self.total(), True
        yield
        self.began, self.paused = self.monotonic(), False


def summarize(model, bucket, autocast):
    """`summary` of the model; ConfigError where a clip does not fit the memory even without gradients."""
    try:
        with autocast:
            return summary(model, bucket.size, bucket.frames)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(f"out of memory with one clip of {bucket.frames} frames of {bucket.size}x{bucket.size}: set "
                          "size or frames lower") from None


def summary(model, size, frames):
    """Parameters and output shape of every layer, and of the whole, for one clip of `frames` x `size` x `size`. A layer
    that takes the clip in pieces, as on CPUs, is one line: the frames of all its calls."""
    shapes, hooks = {}, []  # name and class of each layer: the shape of what it gives
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
