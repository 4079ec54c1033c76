"""The pages' own words, in English and Chinese. Texts of the run are shown as they are."""

from __future__ import annotations

from collections.abc import Mapping

LANGUAGES = {"en": "English", "zh": "中文"}
ZH: Mapping[str, str] = {
    "Run": "运行", "Questions": "题目", "Audit": "审核", "Decisions": "决定", "Compare": "比较",
    "Report": "报告", "all": "全部", "Filter": "筛选", "Search": "搜索", "Clear": "清除",
    "sorted by doubt": "按疑点排序", "sorted by id": "按编号排序", "split": "划分", "source": "来源",
    "rung": "层级", "verdict": "判定", "model": "模型", "wrong": "答错", "right": "答对", "decision": "决定",
    "suspect labels only": "仅可疑标签", "unsolved only": "仅未解决", "decided only": "仅已决定",
    "language": "语言", "question": "题目",
    "label": "标签", "votes for the label": "支持标签的票", "models say": "模型认为", "Problem": "题干",
    "Votes": "票数", "For the label": "支持标签", "Against the label": "反对标签",
    "Unreadable or cut": "无法读取或被截断", "Answers": "答案", "accepted": "采用", "not accepted": "未采用",
    "order shown": "显示顺序", "compare with the other side": "与另一方对照", "next": "下一页",
    "previous": "上一页", "back to the list": "返回列表", "keep": "保留", "relabel": "改标签", "drop": "删除",
    "skip": "跳过", "undo": "撤销", "note": "备注", "blind": "盲审", "of": "／", "decided": "已决定",
    "about": "约", "min left": "分钟", "Your name": "您的名字", "Set": "设定", "Keys": "快捷键",
    "reviewer": "审核人", "stale": "已过期", "conflict": "冲突", "agreement": "一致", "settle": "裁定",
    "To go on from the decisions, run": "根据这些决定继续，请运行", "Nothing is there yet.": "尚无内容。",
    "stage": "阶段", "state": "状态", "done": "完成", "not yet": "未完成", "running": "运行中",
    "spent": "已花费", "calls": "次调用", "in flight": "进行中", "tokens a second": "每秒词元",
    "an hour": "每小时", "left": "剩余", "last errors": "最近错误", "loss": "损失",
    "nothing runs": "没有运行中的命令", "Nothing has moved for": "已停顿", "before": "之前", "after": "之后",
    "fixed": "改对", "broken": "改错", "both right": "都对", "both wrong": "都错", "difference": "差异",
    "interval": "区间", "system": "系统", "accuracy": "准确率", "is looking at this": "正在查看此题",
    "different text or label since": "题目或标签此后已改动", "Skip to content": "跳到正文",
    "name a file for decisions": "请先指定保存决定的文件", "your first answer": "您的首次答案",
    "solved": "已解决", "asked": "已问", "progress": "进度", "no": "无", "yes": "有", "Language": "语言",
    "No label is in doubt.": "没有存疑的标签。", "order": "排序",
    "All doubtful labels are decided.": "所有存疑标签均已决定。",
    "Settings": "设置", "unparsed": "无法读取", "truncated": "被截断",
}  # fmt: skip


def translate(language: str, text: str) -> str:
    """A text of the pages in a language; as it is where nobody has translated it."""
    return ZH.get(text, text) if language == "zh" else text
