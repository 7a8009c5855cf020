"""What a process would send to the internet, recorded."""

import contextlib
import socket
import threading


@contextlib.contextmanager
def recording_proxy(home):
    """A proxy that takes connections, notes what they ask for, and closes them: the environment that leads there, and its notes.

    `home` is the processes' HOME, in which nothing is to be found about the machine afterwards.
    """
    attempts = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def record():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.settimeout(5)
                        with contextlib.suppress(OSError):
                            attempts.append(connection.recv(4096))

        thread = threading.Thread(target=record, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        names = ("http_proxy", "https_proxy", "all_proxy")
        towards = {variable: url for name in names for variable in (name, name.upper())}
        yield (
            {**towards, "HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "NO_PROXY": "", "no_proxy": ""},
            attempts,
        )
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
