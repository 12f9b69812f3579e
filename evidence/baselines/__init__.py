"""The methods of others, each one file that reads beside its paper; all are programs that `onward.Trainer` takes."""
