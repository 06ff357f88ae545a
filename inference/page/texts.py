"""All that the page says, in each language. Numbers and names go into the braces."""

LANGUAGES = {"en": "English", "zh": "中文"}

TEXTS = {
    "en": {
        "lead": "Show it a video or a picture, then ask.",
        "intro": "Attach files with **+** below, or drop them there. They may be several at once, "
        "and more may follow at any turn.",
        "examples": "Or begin with one of these",
        "try": "Try it",
        "ask": "Ask about what you have shown, or attach more",
        "suggestions": [
            "What happens in this video?",
            "What do you see?",
            "How many things are there in all?",
        ],
        "model": "Model",
        "model_help": "What lies in `{folder}`. Another model begins a new conversation.",
        "model_facts": "{parameters:.1f} M parameters with the tower, summary "
        "{summary}, {frames} frames a video",
        "loading": "Loading {name} …",
        "language": "Language",
        "answers": "Answers",
        "temperature": "Temperature",
        "temperature_help": "0: always the likeliest answer, the same each time. Higher: more "
        "various.",
        "top_p": "Top-p",
        "top_p_help": "Draw from the likeliest tokens of this sum. No effect at temperature 0.",
        "top_k": "Top-k",
        "top_k_help": "Draw from so many of the likeliest tokens; 0: from all. No effect at "
        "temperature 0.",
        "repetition_penalty": "Repetition penalty",
        "repetition_penalty_help": "Above 1: rather other words than before.",
        "max_new_tokens": "Longest answer, in tokens",
        "seed": "Seed",
        "seed_help": "The same seed, the same draw. No effect at temperature 0.",
        "videos": "Videos",
        "num_frames": "Frames taken from a video",
        "num_frames_help": "Of what you show from now on. This model's own number is {frames}.",
        "reset": "New conversation",
        "save": "Save the conversation",
        "limits": "Files: up to {mib} MiB, {seconds:g} s, {megapixels:.2g} megapixels a frame, "
        "{visuals} in a conversation. Yours are deleted when you close the page or begin anew.",
        "refused": "A file in red isn't sent: videos and images of up to {mib} MiB are taken.",
        "reading": "Reading {name} …",
        "thinking": "…",
        "facts": "{width} × {height}",
        "facts_video": "{width} × {height}, {seconds:.1f} s, {taken} of {total} frames",
        "strip": "What the model saw, and how much of its summary hangs on each frame",
        "strip_help": "The frames that were taken, with their seconds. The colour tells how much "
        "of the summary, which is all that the language model gets, hangs on a frame: how far the "
        "summary moves when the frame is replaced by the mean of all, in percent of the sum over "
        "frames. It doesn't know the question.",
        "frame": "{seconds:.2f} s: {percent:.1f} % of the summary",
        "not_played": "Your browser can't play this kind of file. The model can see it.",
        "gone": "The file is gone since the connection was cut. The model still knows it.",
        "times": "{tokens} tokens, the first after {first:.2f} s, then {rate:.0f} a second",
        "cut": "cut at the longest length",
        "stopped": "stopped",
        "no_model": "**No trained model in `{folder}`.** The quickstart trains a small one, in "
        "about a quarter of an hour:\n\n```bash\nbash scripts/quickstart.sh\n```\n\nThen reload "
        "this page. A model that lies elsewhere:",
        "bad_model": "This model can't be loaded.",
        "wrong_flags": "The flags after `--` are wrong; the terminal that started this page says "
        "which. `python web_demo.py --help` lists them.",
        "wrong_question": "This can't be asked: {reason}",
        "not_asked": "Your question wasn't asked; it stands below.",
        "too_many": "**{name}** wasn't read: a conversation takes up to {visuals} videos and "
        "images. Begin a new one.",
        "bad_file": "**{name}** can't be used. {mend}",
        "too_large": "Its frames are above the limit of {megapixels:.2g} megapixels. Make them "
        "smaller: `ffmpeg -i in.mp4 -vf scale=1280:-2 out.mp4`",
        "too_long": "It is longer than the limit of {seconds:g} s. Cut it: "
        "`ffmpeg -i in.mp4 -t {seconds:g} -c copy out.mp4`",
        "unreadable": "It isn't a video or an image that can be read, or it is broken. If a player "
        "shows it, write it anew: `ffmpeg -i in.mp4 out.mp4`",
        "timeout": "It wasn't decoded within {timeout:g} s. Write it anew, smaller: "
        "`ffmpeg -i in.mp4 -vf scale=1280:-2 out.mp4`",
        "detail": "The decoder says: {detail}",
    },
    "zh": {
        "lead": "给它看一段视频或一张图片,然后提问。",
        "intro": "点击下方的 **+** 添加文件,或直接拖到那里。"
        "可以一次添加多个,之后每一轮也可以再添加。",
        "examples": "或者从这些例子开始",
        "try": "试一试",
        "ask": "就你展示的内容提问,或添加更多文件",
        "suggestions": [
            "这个视频里发生了什么?",
            "你看到了什么?",
            "一共有几个东西?",
        ],
        "model": "模型",
        "model_help": "`{folder}` 里的模型。换一个模型会开始新的对话。",
        "model_facts": "含视觉塔共 {parameters:.1f} M 参数,"
        "summary 为 {summary},每个视频取 {frames} 帧",
        "loading": "正在加载 {name} …",
        "language": "语言",
        "answers": "回答",
        "temperature": "温度",
        "temperature_help": "0:总是最可能的回答,每次都一样。越高越多样。",
        "top_p": "Top-p",
        "top_p_help": "只从累计概率达到这个值的最可能的 token 中抽取。温度为 0 时不起作用。",
        "top_k": "Top-k",
        "top_k_help": "只从这么多个最可能的 token 中抽取;0 表示全部。温度为 0 时不起作用。",
        "repetition_penalty": "重复惩罚",
        "repetition_penalty_help": "大于 1:更倾向于没说过的词。",
        "max_new_tokens": "回答的最大长度(token)",
        "seed": "随机种子",
        "seed_help": "种子相同,抽取的结果就相同。温度为 0 时不起作用。",
        "videos": "视频",
        "num_frames": "从视频中取的帧数",
        "num_frames_help": "对之后展示的文件有效。这个模型原本取 {frames} 帧。",
        "reset": "新对话",
        "save": "保存对话",
        "limits": "文件:每个最大 {mib} MiB,最长 {seconds:g} 秒,每帧最多 {megapixels:.2g} 百万像素,"
        "每次"
        "对话最多 {visuals} 个。关闭页面或开始新对话时,你的文件会被删除。",
        "refused": "红色的文件不会发送:只接受不超过 {mib} MiB 的视频和图片。",
        "reading": "正在读取 {name} …",
        "thinking": "…",
        "facts": "{width} × {height}",
        "facts_video": "{width} × {height},{seconds:.1f} 秒,取了 {total} 帧中的 {taken} 帧",
        "strip": "模型看到的画面,以及 summary 有多少取决于每一帧",
        "strip_help": "取出的各帧及其时间(秒)。语言模型得到的只有 summary,"
        "颜色表示 summary 有多少取决于这"
        "一帧:把这一帧换成所有帧的平均后 summary 移动的距离,占各帧之和的百分比。它与问题无关。",
        "frame": "{seconds:.2f} 秒:占 summary 的 {percent:.1f} %",
        "not_played": "你的浏览器无法播放这种文件,但模型看得到。",
        "gone": "连接断开后文件已被删除,但模型仍然记得它。",
        "times": "{tokens} 个 token,首个用时 {first:.2f} 秒,之后每秒 {rate:.0f} 个",
        "cut": "达到最大长度,已截断",
        "stopped": "已停止",
        "no_model": "**`{folder}` 里没有训练好的模型。** 快速开始会训练一个小模型,"
        "大约需要一刻钟:\n\n"
        "```bash\nbash scripts/quickstart.sh\n```\n\n然后刷新本页。使用其他位置的模型:",
        "bad_model": "无法加载这个模型。",
        "wrong_flags": "`--` 之后的参数有误,启动本页的终端里写着是哪一个。"
        "`python web_demo.py --help` "
        "会列出所有参数。",
        "wrong_question": "无法这样提问:{reason}",
        "not_asked": "你的问题还没有提出,它仍在下面的输入框里。",
        "too_many": "没有读取 **{name}**:一次对话最多 {visuals} 个视频和图片。请开始新的对话。",
        "bad_file": "无法使用 **{name}**。{mend}",
        "too_large": "它的帧超过了 {megapixels:.2g} 百万像素的上限。请缩小:"
        "`ffmpeg -i in.mp4 -vf scale=1280:-2 out.mp4`",
        "too_long": "它超过了 {seconds:g} 秒的上限。请截短:"
        "`ffmpeg -i in.mp4 -t {seconds:g} -c copy out.mp4`",
        "unreadable": "它不是可以读取的视频或图片,或者已经损坏。如果播放器能播放它,请重新编码:"
        "`ffmpeg -i in.mp4 out.mp4`",
        "timeout": "没能在 {timeout:g} 秒内解码。请重新编码并缩小:"
        "`ffmpeg -i in.mp4 -vf scale=1280:-2 out.mp4`",
        "detail": "解码器的说明:{detail}",
    },
}


def language_of(locale: str | None) -> str:
    """The page's language for a browser's, such as "zh-CN"."""
    return "zh" if (locale or "").lower().startswith("zh") else "en"
