"""Networks as users may write them, each with one fault or peculiarity, and their factories."""

import torch
from torch import nn
from torch.nn import functional


def _factory(forward, **layers):
    """A factory of networks for 8×8 grey images: `forward(self, images) -> (batch, 64)`, then a linear head."""

    class Network(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            for name, make in layers.items():
                setattr(self, name, make())
            self.head = nn.Linear(64, num_classes)

        def forward(self, images):
            return self.head(forward(self, images))

    return lambda num_classes, input_shape: Network(num_classes)


minus_mean = _factory(lambda self, x: (x - x.mean(dim=0)).flatten(1))
by_largest = _factory(lambda self, x: (x / x.max()).flatten(1))
untracked_norm = _factory(
    lambda self, x: self.norm(x).flatten(1), norm=lambda: nn.BatchNorm2d(1, track_running_stats=False)
)
norm_in_training = _factory(lambda self, x: functional.batch_norm(x, None, None, training=True).flatten(1))
attention_over_batch = _factory(
    lambda self, x: self.attention(x[:, 0], x[:, 0], x[:, 0])[0].flatten(1),
    attention=lambda: nn.MultiheadAttention(8, 2),
)
looping = _factory(lambda self, x: torch.stack([v.flatten() for v in x]))
writes_to_input = _factory(lambda self, x: x.mul_(2).flatten(1))


class _Ends(nn.Module):
    def __init__(self, num_classes, end):
        super().__init__()
        self.body, self.end = nn.Linear(64, num_classes), end

    def forward(self, images):
        return self.end(self.body(images.flatten(1)))


class _Squeezing(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Conv2d(1, num_classes, 8)

    def forward(self, images):
        return self.head(images).squeeze()


class _Settling(nn.Module):
    """Its running level changes in eval mode, too."""

    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(64, num_classes)
        self.register_buffer("level", torch.tensor(1.0))

    def forward(self, images):
        self.level.mul_(0.9).add_(0.1 * images.detach().mean())  # pyright: ignore[reportCallIssue]
        return self.head(images.flatten(1) - self.level)


class _Auxiliary(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head, self.other = nn.Linear(64, num_classes), nn.Linear(64, num_classes)

    def forward(self, images):
        logits = self.head(images.flatten(1))
        return (logits, self.other(images.flatten(1))) if self.training else logits


class _Pixels(nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :3]


class _ManyChannelViews(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(256, num_classes)

    def forward(self, images):
        return self.head(self.norm(self.conv(images)).view(len(images), -1))


class _Antialias(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(32, num_classes)

    def forward(self, images):
        return self.head(functional.interpolate(self.conv(images), 4, mode="bilinear", antialias=True).flatten(1))


def softmax(num_classes, input_shape):
    return _Ends(num_classes, nn.Softmax(dim=1))


def log_softmax(num_classes, input_shape):
    return _Ends(num_classes, nn.LogSoftmax(dim=1))


def sigmoid(num_classes, input_shape):
    return _Ends(num_classes, nn.Sigmoid())


def squeezing(num_classes, input_shape):
    return _Squeezing(num_classes)


def settling(num_classes, input_shape):
    return _Settling(num_classes)


def auxiliary(num_classes, input_shape):
    return _Auxiliary(num_classes)


def without_parameters(num_classes, input_shape):
    return _Pixels()


def viewing(num_classes, input_shape):
    return _ManyChannelViews(num_classes)


def antialiased(num_classes, input_shape):
    return _Antialias(num_classes)
