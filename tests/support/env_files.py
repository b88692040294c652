"""Environment files as apps have them, with our keys in every spelling that some reader knows."""

OURS = {"LIVEKIT_URL": "wss://livekit.test", "LIVEKIT_API_KEY": "APIours", "TURN_TTL": "3600"}

FILES = {
    "empty": "",
    "plain": "A=1\nLIVEKIT_API_KEY=old\nB=2\n",
    "no newline at the end": "LIVEKIT_API_KEY=old\nB=2",
    "twice": "LIVEKIT_API_KEY=old\nB=2\nLIVEKIT_API_KEY=older\n",
    "export": "LIVEKIT_API_KEY=old\nexport LIVEKIT_API_KEY=other\nB=2\n",
    "export before": "export LIVEKIT_API_KEY=other\nB=2\nLIVEKIT_API_KEY=old\n",
    "export with a tab": "LIVEKIT_API_KEY=old\nexport\tLIVEKIT_API_KEY=other\nB=2\n",
    "several in a line": "LIVEKIT_API_KEY=old\nexport B=2 LIVEKIT_API_KEY=other TURN_TTL=1\n",
    "blanks": "LIVEKIT_API_KEY=old\n LIVEKIT_API_KEY = other\nB=2\n",
    "quoted key": "LIVEKIT_API_KEY=old\n'LIVEKIT_API_KEY'=other\nB=2\n",
    "colon": "LIVEKIT_API_KEY=old\nLIVEKIT_API_KEY: other\nB=2\n",
    "key alone": "LIVEKIT_API_KEY=old\nLIVEKIT_API_KEY\nB=2\n",
    "unset": "LIVEKIT_API_KEY=old\nunset LIVEKIT_API_KEY\nB=2\n",
    "small letters": "LIVEKIT_API_KEY=old\nlivekit_api_key=other\nB=2\n",
    "continued": "LIVEKIT_API_KEY=old\nB=2\\\nLIVEKIT_API_KEY=other\n",
    "continued at the end": "B=2\nPATH_TO=C:\\",
    "continued comment": "# a comment \\\nLIVEKIT_API_KEY=old\n",
    "carriage returns": "A=1\r\nLIVEKIT_API_KEY=old\r\nB=2\r\n",
    "byte order mark": "\ufeffLIVEKIT_API_KEY=old\nB=2\n",
    "within quotes": 'B="two\nLIVEKIT_API_KEY=quoted\nlines"\nC=3\n',
    "within single quotes": "B='two\nLIVEKIT_API_KEY=quoted\nlines'\nC=3\n",
    "escaped quote": 'B="a \\" b"\nLIVEKIT_API_KEY=old\n',
    "old value of several lines": 'LIVEKIT_API_KEY="old\nB=no"\nC=3\n',
    "referred to": "LIVEKIT_URL=ws://old\nB=${LIVEKIT_URL}/x\n",
    "comments": "#LIVEKIT_API_KEY=old\n  # LIVEKIT_API_KEY=old\nB=2 # LIVEKIT_API_KEY=x\n",
}
