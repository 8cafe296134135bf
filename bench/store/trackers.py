"""The trackers that come with the suite."""

from bench.store.tracking import MlflowTracker as MlflowTracker
from bench.store.trackio_tracker import TrackioTracker as TrackioTracker
